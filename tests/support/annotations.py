"""Checks arrays against the shapes and dtypes in the package's signatures, while tests run.

jaxtyping's import hook decorates every function and dataclass of a module with a type checker. This checker looks at
arrays only: what has a shape and a dtype must match its annotation, such as `Float[Array, "m k"]`, and the sizes of one
call must agree. numpy arrays, traced values and references count as arrays, as for the functions themselves. The rest
is left to the package's own errors: None and placeholders in pytrees, static arguments.

Arguments are checked when the function has returned, so that the package's own errors come first.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import jaxtyping

PACKAGE = Path(__file__).resolve().parents[2] / "bipolar_jax"
CHECKER = f"{__name__}.check_arrays"


def check_arrays_of_package() -> None:
    """Installs the hook for the modules that annotate arrays; to be called before the package is imported.

    The checks are off until `checking` turns them on.
    """
    annotated = [path for path in PACKAGE.rglob("*.py") if "jaxtyping" in path.read_text()]
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in annotated]
    jaxtyping.install_import_hook([name.removesuffix(".__init__") for name in modules], CHECKER)
    jaxtyping.jaxtyped = _where_arrays_are_annotated(jaxtyping.jaxtyped)
    checking(False)


def checking(on: bool) -> None:
    jaxtyping.config.update("jaxtyping_disable", not on)


def _where_arrays_are_annotated(jaxtyped: Callable) -> Callable:
    """The decorator that the hook puts on every function, but functions without annotated arrays stay as they are.

    Stand-ins take 0.3 ms to make, each time that a function within a function is defined, and 7 us a call.
    """

    def decorator(*args, **kwargs):
        decorate = jaxtyped(*args, **kwargs)
        return lambda decorated: decorate(decorated) if _may_annotate_arrays(decorated) else decorated

    return decorator


def _may_annotate_arrays(decorated) -> bool:
    """Whether it is a function that annotates an array, or anything else that the hook decorates."""
    if not isinstance(decorated, types.FunctionType):
        return True
    module = decorated.__globals__
    return any(_evaluated_names_arrays(hint, module["__name__"], module) for hint in decorated.__annotations__.values())


_found: dict[tuple[str, str], bool] = {}


def _evaluated_names_arrays(hint, module_name: str, names: dict) -> bool:
    if not isinstance(hint, str):
        return _names_arrays(hint)
    key = (module_name, hint)
    if key not in _found:
        try:
            _found[key] = _names_arrays(eval(hint, names))
        except NameError:  # of a function around it, or defined further down
            return True
    return _found[key]


def check_arrays(function: Callable) -> Callable:
    """The type checker for jaxtyping, which gives it two stand-ins of every function.

    One has the parameters alone, returns Any, and is called before the function. The other is called after it: it has
    a further parameter, the function's result, and returns that. Only the second is checked.

    Raises (the result): TypeError, if an array differs from its annotation.
    """
    signature = inspect.signature(function)
    returned = signature.return_annotation
    hints = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    hints = {name: hint for name, hint in hints.items() if _names_arrays(hint)}
    if returned is typing.Any or not (hints or _names_arrays(returned)):
        return lambda *args, **kwargs: None

    def check(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        values = [(name, arguments[name], hint) for name, hint in hints.items() if name in arguments]
        for name, value, hint in [*values, ("the result", function(*args, **kwargs), returned)]:
            if not _matches(value, hint):
                raise TypeError(f"{name} has {_described(value)}, but is annotated {hint}")

    return check


def _described(value) -> str:
    return str(jax.tree.map(lambda array: f"{array.dtype}{list(array.shape)}" if _is_array(array) else array, value))


def _is_array(value) -> bool:
    """Whether it has a shape and a dtype; a gradient of integers, which has no values, counts as none."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and value.dtype != jax.dtypes.float0


def _is_array_type(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _names_arrays(hint) -> bool:
    return _is_array_type(hint) or any(_names_arrays(part) for part in typing.get_args(hint))


def _matches(value, hint) -> bool:
    if _is_array_type(hint):
        return not _is_array(value) or isinstance(value, _of_any_array(hint))
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, part) for part in parts)
    if origin is tuple and isinstance(value, tuple):
        parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(parts) == len(value) and all(map(_matches, value, parts))
    return True


@functools.cache
def _of_any_array(hint) -> type:
    """The same dtypes and shapes, for any kind of array."""
    return hint.dtype[typing.Any, hint.dim_str]

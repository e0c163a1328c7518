"""Which backend serves an operation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from bipolar_jax.kernels import reference, sm90, xla
from bipolar_jax.kernels.unsupported import Unsupported

BACKENDS: dict[str, ModuleType] = {"reference": reference, "sm90": sm90, "xla": xla}

# Tried in this order under implementation="auto"; the reference is for comparing, not for use.
_AUTO_ORDER = ("sm90", "xla")


def check_implementation(implementation: str) -> None:
    """Raises ValueError unless `implementation` is "auto" or the name of a backend."""
    if implementation != "auto" and implementation not in BACKENDS:
        raise ValueError(f"implementation must be one of auto, {', '.join(BACKENDS)}; got {implementation!r}")


def first_able[Result](implementation: str, call: Callable[[ModuleType], Result]) -> tuple[Result, str, dict[str, str]]:
    """Calls the chosen backend, or under "auto" the first that can serve the request.

    Returns:
      What the call returned, the backend's name, and those tried before with what each could not do.

    Raises:
      Unsupported: no backend that was tried can serve it; lists each one's reason.
    """
    passed_over: dict[str, str] = {}
    for name in _AUTO_ORDER if implementation == "auto" else (implementation,):
        try:
            return call(BACKENDS[name]), name, passed_over
        except Unsupported as reason:
            passed_over[name] = str(reason)
    raise Unsupported("no backend can serve this product: " + "; ".join(map(": ".join, passed_over.items())))


def dispatch[Result](implementation: str, call: Callable[[ModuleType], Result]) -> Result:
    """What `first_able` returns of the call."""
    result, _, _ = first_able(implementation, call)
    return result

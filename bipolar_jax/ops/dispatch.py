"""The choice of the backend that serves an operation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from bipolar_jax.kernels import reference, xla
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.core.execution import check_runnable
from bipolar_jax.kernels.unsupported import Unsupported

BACKENDS: dict[str, ModuleType] = {"reference": reference, "sm90": sm90, "xla": xla}

# What "auto" tries, in this order; the reference is slow and only compared with.
AUTO_ORDER = ("sm90", "xla")


def hopper_serves() -> bool:
    """Whether Hopper's kernels run on the default device, or interpreted."""
    try:
        check_runnable()
    except Unsupported:
        return False
    return True


def check_implementation(implementation: str) -> None:
    """Raises ValueError unless `implementation` is "auto" or the name of a backend."""
    if implementation != "auto" and implementation not in BACKENDS:
        raise ValueError(f"implementation must be one of auto, {', '.join(BACKENDS)}; got {implementation!r}")


def first_able[Result](
    implementation: str, call: Callable[[ModuleType], Result], operation: str = "this product"
) -> tuple[Result, str, dict[str, str]]:
    """Calls the named backend, or under "auto" the first one that serves the request.

    A backend refuses by raising `Unsupported`. Any other error, a plain NotImplementedError included, propagates.

    Args:
      implementation: "auto" or the name of a backend.
      call: runs, or plans, the operation on a backend.
      operation: what error messages call it.

    Returns:
      What the call returned, the name of the backend, and the reason of each backend that refused before it.

    Raises:
      Unsupported: every backend that was tried refused; lists each one's reason.
    """
    passed_over: dict[str, str] = {}
    for name in AUTO_ORDER if implementation == "auto" else (implementation,):
        try:
            return call(BACKENDS[name]), name, passed_over
        except Unsupported as reason:
            passed_over[name] = str(reason)
    raise Unsupported(f"no backend can serve {operation}: " + "; ".join(map(": ".join, passed_over.items())))


def dispatch[Result](
    implementation: str, call: Callable[[ModuleType], Result], operation: str = "this product"
) -> Result:
    """The result of the call on the backend that `first_able` finds; raises as it does."""
    result, _, _ = first_able(implementation, call, operation)
    return result

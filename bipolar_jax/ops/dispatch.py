"""Which backend serves an operation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from bipolar_jax.kernels import reference, sm90, xla

BACKENDS: dict[str, ModuleType] = {"reference": reference, "sm90": sm90, "xla": xla}

# Tried in this order under implementation="auto"; the reference is for comparing, not for use.
_AUTO_ORDER = ("sm90", "xla")


def check_implementation(implementation: str) -> None:
    """Raises ValueError unless `implementation` is "auto" or the name of a backend."""
    if implementation != "auto" and implementation not in BACKENDS:
        raise ValueError(f"implementation must be one of auto, {', '.join(BACKENDS)}; got {implementation!r}")


def tried_under(implementation: str) -> tuple[str, ...]:
    """Names of the backends to try, in order."""
    return _AUTO_ORDER if implementation == "auto" else (implementation,)


def dispatch[Result](implementation: str, call: Callable[[ModuleType], Result]) -> Result:
    """Calls the chosen backend, or under "auto" the first that can serve the request.

    Raises:
      NotImplementedError: no backend that was tried can serve it; lists each one's reason.
    """
    reasons = []
    for name in tried_under(implementation):
        try:
            return call(BACKENDS[name])
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no backend can serve this product: " + "; ".join(reasons))

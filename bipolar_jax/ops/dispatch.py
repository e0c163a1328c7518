"""Which backend serves an operation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from bipolar_jax.kernels import reference, xla

BACKENDS: dict[str, ModuleType] = {"reference": reference, "xla": xla}

# Tried in this order under implementation="auto"; the reference is for comparing, not for use.
_AUTO_ORDER = ("xla",)


def check_implementation(implementation: str) -> None:
    """Raises ValueError unless `implementation` is "auto" or the name of a backend."""
    if implementation != "auto" and implementation not in BACKENDS:
        raise ValueError(f"implementation must be one of auto, {', '.join(BACKENDS)}; got {implementation!r}")


def dispatch[Result](implementation: str, call: Callable[[ModuleType], Result]) -> Result:
    """Calls the chosen backend, or under "auto" the first that can serve the request.

    Raises:
      NotImplementedError: no backend that was tried can serve it; lists each one's reason.
    """
    names = _AUTO_ORDER if implementation == "auto" else (implementation,)
    reasons = []
    for name in names:
        try:
            return call(BACKENDS[name])
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no backend can serve this product: " + "; ".join(reasons))

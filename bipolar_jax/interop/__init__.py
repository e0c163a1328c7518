"""Arrays and rules of other quantization libraries: qwix (github.com/google/qwix)."""

from bipolar_jax.interop.qwix_arrays import from_qwix, to_qwix
from bipolar_jax.interop.qwix_rules import rules_from_qwix

__all__ = ["from_qwix", "rules_from_qwix", "to_qwix"]

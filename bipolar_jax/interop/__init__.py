"""Arrays of other quantization libraries: qwix (github.com/google/qwix)."""

from bipolar_jax.interop.qwix_arrays import from_qwix, to_qwix

__all__ = ["from_qwix", "to_qwix"]

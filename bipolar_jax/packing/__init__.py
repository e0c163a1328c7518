"""Arrays of bipolar numbers, packed as bit planes."""

from bipolar_jax.packing.bipolar_array import BipolarArray
from bipolar_jax.packing.pack import from_codes, quantize

__all__ = ["BipolarArray", "from_codes", "quantize"]

"""Arrays of bipolar numbers, packed as bit planes."""

from bipolar_jax.packing.bipolar_array import BipolarArray
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers
from bipolar_jax.packing.block_scaled_array import BlockScaledArray
from bipolar_jax.packing.pack import from_codes, quantize
from bipolar_jax.packing.prepared_array import PreparedArray
from bipolar_jax.packing.unpacked_array import UnpackedArray

__all__ = [
    "BipolarArray",
    "BipolarNumbers",
    "BlockScaledArray",
    "PreparedArray",
    "UnpackedArray",
    "from_codes",
    "quantize",
]

"""The kind of prepared weights of 1 and 2 bits beside one token: `WeightKind` of bits."""

from __future__ import annotations

from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.decode_step.bit_sums import bit_products
from bipolar_jax.kernels.sm90.decode_step.bit_sums.token_planes import PlaneLayout
from bipolar_jax.kernels.sm90.decode_step.prepared_products import PreparedKind
from bipolar_jax.kernels.sm90.decode_step.token_bytes import TokenLayout


class BitsKind(PreparedKind):
    """See `weight_ring.WeightKind`; slots, and the size of the token, are those of `PreparedKind`."""

    @property
    def _token_layout(self) -> TokenLayout:
        return PlaneLayout()

    def zeros(self) -> Int[Array, "512"]:
        return bit_products.zeros()

    def add_stages(self, total, words, terms, token, part_of_slice, valid) -> Int[Array, "512"]:
        return bit_products.add_stages(total, words, terms, token, part_of_slice, valid, self._expansion)

    def add_sums(self, sums, total, start, block_stride: int) -> None:
        bit_products.add_sums(sums, total, start, block_stride)

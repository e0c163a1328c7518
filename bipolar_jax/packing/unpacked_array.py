"""`UnpackedArray`: bipolar numbers with one byte for each code."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers, register_numbers, static_field
from bipolar_jax.quantize.groups import join_groups, num_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups


@register_numbers
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class UnpackedArray(BipolarNumbers):
    """A `BipolarArray` with one byte for each code, made by its `unpack`; files and GPU kernels do not take it.

    It is the operand of products on CPUs: taking bits out of planes costs more there than the product of one token.
    Always:

    - `signed_codes[..., g, n, j]` is the signed code (`BipolarFormat.signed_codes`) of element j of group g of row n,
      and 0 where a short last group is padded; with integer groups it is the value of element j of row n, for g = 0;
    - all else is as in `BipolarArray`.
    """

    signed_codes: Int8[Array, "*batch groups n size"]
    scale: Float[Array, "*batch n scales"]
    offset: Float[Array, "*batch n scales"] | None
    row_sums: Int[Array, "*batch n scales"]
    format: BipolarFormat = static_field()  # noqa: RUF009 - a field
    contracted_size: int = static_field()
    axis: int = static_field()
    group_size: int | None = static_field()
    groups: IntegerGroups | None = None

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""
        rows = join_groups(jnp.moveaxis(self.signed_codes, -3, -2), self.contracted_size)
        if self.groups is not None:
            return self.groups.codes(rows, self.group_size)
        return (rows.astype(jnp.int32) + self.format.code_offset).astype(jnp.uint8)

    def check(self) -> None:
        """Raises ValueError if the shapes of the leaves do not fit each other and the static attributes."""
        *batch, groups, n, size = self.signed_codes.shape
        wrong = self._misshaped((*batch, n))
        k, shared = self.contracted_size, self.scale_group_size
        if (groups, size) != (num_groups(k, shared), shared or k) or wrong:
            raise ValueError(
                f"inconsistent UnpackedArray: codes {tuple(self.signed_codes.shape)} for contracted size "
                f"{self.contracted_size} in {self.num_groups} groups, {', '.join(wrong) or 'with such scales'}"
            )

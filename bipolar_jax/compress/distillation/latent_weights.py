"""Float numbers behind packed weights, which training moves and rounding turns into codes again.

Always, for the weights of one layer:

- right after `LatentWeights.of` the codes are those of the packed array, whatever the float weights are;
- `numbers()` are the numbers of `packed()`, up to the rounding of a float32 sum;
- integer groups stay as they are, unless their integers learn, too: then these are rounded like codes. The one scale of
  each row learns, and sums stay exact integers.

Gradients are straight-through (LSQ, arXiv 1902.08153; offsets as in LSQ+, arXiv 2004.09576), except that a latent
weight has one in all of the outermost cells, and not only in their inner halves: of few bits half of the weights are
there.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from bipolar_jax.compress.reconstruction.learned_grid import INSIDE
from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray, from_codes
from bipolar_jax.quantize.calibration import half_steps_per_unit
from bipolar_jax.quantize.groups import spread_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from bipolar_jax.quantize.learned_step import LearnedGroups
from bipolar_jax.quantize.rounding import encode_rows
from bipolar_jax.quantize.straight_through import straight_through


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LatentGroups:
    """Scales and offsets of groups before they are rounded to integers, in the units of float groups.

    Float groups' learning rates then suit them: with S the row's scale at the start, s and o are

    Attributes:
      scale: S s / 2.
      offset: S o.
      unit: S, which does not learn; 0 in rows of zeros.
    """

    scale: Float[Array, "*stack n groups"]
    offset: Float[Array, "*stack n groups"]
    unit: Float[Array, "*stack n 1"]

    @classmethod
    def of(cls, row_scale: Float[Array, "*stack n 1"], groups: IntegerGroups) -> LatentGroups:
        """Those of integers."""
        scale, offset = (array.astype(jnp.float32) for array in (groups.scale, groups.offset))
        return cls(row_scale * (scale / 2), row_scale * offset, row_scale)

    def integers(self, row_scale: Float[Array, "*stack n 1"], number_format: BipolarFormat) -> IntegerGroups:
        """The nearest integers within the limits of the format."""
        return self._learned(row_scale).rounded(number_format)[1]

    def numbers(
        self, row_scale: Float[Array, "*stack n 1"], number_format: BipolarFormat
    ) -> tuple[Float[Array, "*stack n groups"], Float[Array, "*stack n groups"]]:
        """s and o as floats, differentiated as if they had not been rounded."""
        learned = self._learned(row_scale)
        integers = learned.rounded(number_format)[1]
        pairs = (integers.scale, learned.scale), (integers.offset, learned.offset)
        scale, offset = (straight_through(rounded.astype(jnp.float32), exact) for rounded, exact in pairs)
        return scale, offset

    def _learned(self, row_scale: Float[Array, "*stack n 1"]) -> LearnedGroups:
        per_unit = jnp.where(self.unit > 0, 1 / jnp.where(self.unit > 0, self.unit, 1), 0)
        return LearnedGroups(jax.lax.stop_gradient(row_scale), self.scale * (2 * per_unit), self.offset * per_unit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LatentWeights:
    """What training moves. Rows are the layer's outputs; there may be a stack of layers before them.

    Attributes:
      rows: latent weights, float32.
      scale: of each group, half a step; with integer groups the row's scale times `_unit`, so that it counts as a step
        of usual size, of which one learning rate suits all.
      offset: of each group; None with integer groups, and on grids without one.
      groups: integer groups, which do not learn, or `LatentGroups`, which do.
      format: the grid.
      group_size: numbers that share a scale, or None.
    """

    rows: Float[Array, "*stack n k"]
    scale: Float[Array, "*stack n scales"]
    offset: Float[Array, "*stack n scales"] | None
    groups: IntegerGroups | LatentGroups | None
    format: BipolarFormat = dataclasses.field(metadata={"static": True})
    group_size: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, packed: BipolarArray, floats: Float[Array, "*stack k n"] | None = None) -> LatentWeights:
        """Those of a packed array.

        Args:
          packed: weights that are contracted along the axis before the last.
          floats: the weights before they were rounded, or None: where each would be within its cell. They are moved to
            within `INSIDE` steps of the cell's centre.

        Raises:
          ValueError: floats of another shape.
        """
        if floats is not None and floats.shape != packed.shape:
            raise ValueError(f"float weights have the shape {floats.shape}, the packed ones {packed.shape}")
        return _latent(packed, floats)

    def grid(self) -> tuple[Float[Array, "*stack n groups"], Float[Array, "*stack n groups"] | None]:
        """Scales and offsets of groups: a value v of the format stands for scale * v + offset."""
        if self.groups is None:
            return self.scale, self.offset
        row_scale = self.scale / _unit(self.format)
        if isinstance(self.groups, LatentGroups):
            scale, offset = self.groups.numbers(row_scale, self.format)
        else:
            scale, offset = (array.astype(jnp.float32) for array in (self.groups.scale, self.groups.offset))
        return row_scale * (scale / 2), row_scale * (offset + scale * (self.format.max_value / 2))

    def with_latent_groups(self) -> LatentWeights:
        """The same weights, of which integers of groups learn, too; without integer groups as they are."""
        if self.groups is None:
            return self
        return dataclasses.replace(self, groups=LatentGroups.of(self.scale / _unit(self.format), self.groups))

    def codes(self) -> UInt8[Array, "*stack n k"]:
        """Codes of the nearest values."""
        scale, offset = self.grid()
        return encode_rows(self.rows, self.format, half_steps_per_unit(scale), offset, self.group_size)

    def numbers(self) -> Float[Array, "*stack n k"]:
        """The rounded weights, differentiable in rows, scale and offset.

        With z = (w - offset) / scale and the nearest value v, the derivatives are, where |z| <= W + 1 (the cells of the
        format): 1 by w, v - z by scale, 0 by offset; and beyond: 0 by w, v by scale, 1 by offset.
        """
        scale, offset = self.grid()
        k, edge = self.rows.shape[-1], self.format.max_value + 1
        codes = jax.lax.stop_gradient(self.codes())
        scale = spread_groups(scale, k, self.group_size)
        offset = 0.0 if offset is None else spread_groups(offset, k, self.group_size)
        in_scales = (self.rows - offset) / jnp.where(scale == 0, 1, scale)
        values = self.format.values(codes).astype(jnp.float32)
        return scale * straight_through(values, jnp.clip(in_scales, -edge, edge)) + offset

    def packed(self) -> BipolarArray:
        """The rounded weights as a packed array, contracted along the axis before the last."""
        return _packed(self)


@jax.jit  # one program a shape, not one an operation
def _latent(packed: BipolarArray, floats: Float[Array, "*stack k n"] | None) -> LatentWeights:
    centre = jnp.swapaxes(packed.dequantize(), -1, -2)
    unit = _unit(packed.format) if packed.groups is not None else 1
    latent = LatentWeights(centre, packed.scale * unit, packed.offset, packed.groups, packed.format, packed.group_size)
    if floats is None:
        return latent
    scale, _ = latent.grid()
    reach = 2 * INSIDE * spread_groups(jnp.abs(scale), centre.shape[-1], packed.group_size)
    rows = jnp.clip(jnp.swapaxes(floats, -1, -2).astype(jnp.float32), centre - reach, centre + reach)
    return dataclasses.replace(latent, rows=rows)


@jax.jit
def _packed(latent: LatentWeights) -> BipolarArray:
    codes = jnp.swapaxes(latent.codes(), -1, -2)
    groups, scale = latent.groups, latent.scale if latent.groups is None else latent.scale / _unit(latent.format)
    if isinstance(groups, LatentGroups):
        groups = groups.integers(scale, latent.format)
    return from_codes(codes, latent.format, -2, scale, latent.offset, latent.group_size, groups)


def _unit(number_format: BipolarFormat) -> int:
    """About the largest integer scale of a group; a power of two, so that no number is rounded."""
    return 1 << (8 - number_format.bits)

"""Float numbers behind packed weights, which training moves and rounding turns into codes again.

Always, for the weights of one layer:

- right after `LatentWeights.of` the codes are those of the packed array, whatever the float weights are;
- `numbers()` are the numbers of `packed()`, up to the rounding of a float32 sum;
- integer groups stay as they are: only the one scale of each row learns, so sums stay exact integers.

Gradients are straight-through (LSQ, arXiv 1902.08153; offsets as in LSQ+, arXiv 2004.09576), except that a latent
weight has one in all of the outermost cells, and not only in their inner halves: of few bits half of the weights are
there.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray, from_codes
from bipolar_jax.quantize.calibration import half_steps_per_unit
from bipolar_jax.quantize.groups import spread_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from bipolar_jax.quantize.rounding import encode_rows
from bipolar_jax.quantize.straight_through import straight_through

# Latent weights start within this many steps of the centre of their cell: rounding had moved them up to half a step and
# more, and one that starts at the border changes its code with the first update.
INSIDE = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LatentWeights:
    """What training moves. Rows are the layer's outputs; there may be a stack of layers before them.

    Attributes:
      rows: latent weights, float32.
      scale: of each group, half a step; with integer groups the row's scale times `_unit`, so that it counts as a step
        of usual size, of which one learning rate suits all.
      offset: of each group; None with integer groups, and on grids without one.
      groups: integer groups, which do not learn.
      format: the grid.
      group_size: numbers that share a scale, or None.
    """

    rows: Float[Array, "*stack n k"]
    scale: Float[Array, "*stack n scales"]
    offset: Float[Array, "*stack n scales"] | None
    groups: IntegerGroups | None
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
        centre = jnp.swapaxes(packed.dequantize(), -1, -2)
        unit = _unit(packed.format) if packed.groups is not None else 1
        latent = cls(centre, packed.scale * unit, packed.offset, packed.groups, packed.format, packed.group_size)
        if floats is None:
            return latent
        if floats.shape != packed.shape:
            raise ValueError(f"float weights have the shape {floats.shape}, the packed ones {packed.shape}")
        scale, _ = latent.grid()
        reach = 2 * INSIDE * spread_groups(jnp.abs(scale), centre.shape[-1], packed.group_size)
        rows = jnp.clip(jnp.swapaxes(floats, -1, -2).astype(jnp.float32), centre - reach, centre + reach)
        return dataclasses.replace(latent, rows=rows)

    def grid(self) -> tuple[Float[Array, "*stack n groups"], Float[Array, "*stack n groups"] | None]:
        """Scales and offsets of groups: a value v of the format stands for scale * v + offset."""
        if self.groups is None:
            return self.scale, self.offset
        row_scale = self.scale / _unit(self.format)
        scale, offset = (array.astype(jnp.float32) for array in (self.groups.scale, self.groups.offset))
        return row_scale * (scale / 2), row_scale * (offset + scale * (self.format.max_value / 2))

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
        codes = jnp.swapaxes(self.codes(), -1, -2)
        scale = self.scale if self.groups is None else self.scale / _unit(self.format)
        return from_codes(codes, self.format, -2, scale, self.offset, self.group_size, self.groups)


def _unit(number_format: BipolarFormat) -> int:
    """About the largest integer scale of a group; a power of two, so that no number is rounded."""
    return 1 << (8 - number_format.bits)

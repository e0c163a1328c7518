"""Rounds and packs weights by given scales."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels import xla
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import dispatch
from bipolar_jax.ops.matmul import vary_alike
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.calibration import half_steps_per_unit
from bipolar_jax.quantize.integer_groups import IntegerGroups


def pack_weights(
    w: Float[Array, "*batch k n"],
    number_format: BipolarFormat,
    scale: Float[Array, "*batch n scales"],
    offset: Float[Array, "*batch n scales"] | None = None,
    group_size: int | None = None,
    *,
    groups: IntegerGroups | None = None,
    implementation: str = "auto",
) -> BipolarArray:
    """The bits that `quantize` gives with these scales and offsets, or integer groups. Not differentiable.

    Args:
      w: float32, bfloat16 or float16.
      number_format: the grid.
      scale: float32.
      offset: float32, or None.
      group_size: as for `quantize`.
      groups: integer scales and offsets of the groups, below one `scale` for each column.
      implementation: as for `matmul`; XLA packs what the named backend does not serve.

    Raises:
      ValueError: an unknown implementation.
    """
    grid = (scale, offset) if groups is None else groups.float_grid(scale, number_format)
    w, half_steps, offsets = vary_alike(jax.lax.stop_gradient((w, half_steps_per_unit(grid[0]), grid[1])))

    def pack(backend):
        pack_one = functools.partial(backend.pack_weights, number_format=number_format, group_size=group_size)
        for _ in w.shape[:-2]:
            pack_one = jax.vmap(pack_one)
        return pack_one(w, half_steps, offsets)

    with jax.named_scope("bipolar_pack"):
        try:
            planes, row_sums = dispatch(implementation, pack)
        except Unsupported:
            planes, row_sums = pack(xla)
    if groups is not None:
        row_sums = groups.value_sums(row_sums, w.shape[-2], group_size)
    return BipolarArray(
        planes=planes,
        scale=scale,
        offset=offset,
        row_sums=row_sums,
        format=number_format,
        contracted_size=w.shape[-2],
        axis=-2,
        group_size=group_size,
        groups=groups,
    )

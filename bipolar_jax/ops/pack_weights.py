"""Rounds and packs weights by given scales."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels import xla
from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import dispatch, hopper_serves
from bipolar_jax.ops.matmul import vary_alike
from bipolar_jax.ops.partitioned import lies_on_mesh
from bipolar_jax.packing import BipolarArray, UnpackedArray
from bipolar_jax.packing.bipolar_array import code_sums
from bipolar_jax.quantize.calibration import half_steps_per_unit
from bipolar_jax.quantize.groups import split_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from bipolar_jax.quantize.rounding import encode_rows


def pack_weights(
    w: Float[Array, "*batch k n"],
    number_format: BipolarFormat,
    scale: Float[Array, "*batch n scales"],
    offset: Float[Array, "*batch n scales"] | None = None,
    group_size: int | None = None,
    *,
    groups: IntegerGroups | None = None,
    implementation: str = "auto",
    for_one_product: bool = False,
) -> BipolarArray | UnpackedArray:
    """The bits that `quantize` gives with these scales and offsets, or integer groups. Not differentiable.

    Args:
      w: float32, bfloat16 or float16.
      number_format: the grid.
      scale: float32.
      offset: float32, or None.
      group_size: as for `quantize`.
      groups: integer scales and offsets of the groups, below one `scale` for each column.
      implementation: as for `matmul`; XLA packs what the named backend does not serve, and what lies on a
        mesh of several devices.
      for_one_product: True leaves the weights unpacked on CPUs, where the product would take their bits out again.

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

    fields = {"format": number_format, "contracted_size": w.shape[-2], "axis": -2, "group_size": group_size}
    with jax.named_scope("bipolar_pack"):
        if unpacked := for_one_product and _multiplies_unpacked(implementation):
            codes = encode_rows(jnp.swapaxes(w, -1, -2), number_format, half_steps, offsets, group_size)
            row_sums = code_sums(codes, group_size)
        else:
            try:
                # XLA knows no sharding of kernels, and would gather weights that are cut.
                planes, row_sums = pack(xla) if lies_on_mesh(w) else dispatch(implementation, pack)
            except Unsupported:
                planes, row_sums = pack(xla)
    if groups is not None:
        row_sums = groups.value_sums(row_sums, w.shape[-2], group_size)
    fields |= {"scale": scale, "offset": offset, "row_sums": row_sums, "groups": groups}
    if not unpacked:
        return BipolarArray(planes=planes, **fields)
    if groups is None:
        signed = split_groups(number_format.signed_codes(codes), group_size)
    else:
        signed = groups.values(codes, group_size).astype(jnp.int8)[..., None, :]
    return UnpackedArray(signed_codes=jnp.moveaxis(signed, -2, -3), **fields)


def _multiplies_unpacked(implementation: str) -> bool:
    """Whether XLA multiplies on a CPU, and so would unpack packed weights."""
    if implementation not in ("auto", "xla") or default_device().platform != "cpu":
        return False
    return implementation == "xla" or not hopper_serves()  # the kernels of "auto" may be interpreted

"""The loop that GPTQ and coordinate descent share: inputs are rounded in turn, and each moves the targets of others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.compress.rounding.affine_grid import AffineGrid, NestedGrid

HIGHEST = jax.lax.Precision.HIGHEST


def round_in_turn(
    targets: Float[Array, "k *precisions n"],
    reference: Float[Array, "k *precisions n"],
    coupling: Float[Array, "k k"],
    grid: AffineGrid | NestedGrid,
    groups: Int[Array, "k"],
    block: int,
) -> UInt8[Array, "k n"]:
    """Rounds target after target. With every q[i], later targets j fall by coupling[j, i] (q[i] - reference[i]).

    Rows are independent, so every step is a vector over all of them. Steps within a block read the block alone; all
    other targets follow at its end, in one matrix product (as in GPTQ, arXiv 2210.17323, section 3.3, step 2).

    Args:
      targets: what each input would be rounded to if no other were rounded; for a nested grid one of each precision.
      reference: the numbers from which inputs move.
      coupling: only what is below its diagonal counts.
      grid: of every group.
      groups: the group of every input.
      block: inputs of a block.

    Returns:
      The codes.
    """
    k = len(targets)
    pad = -k % block
    targets, reference = (jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for a in (targets, reference))
    coupling, groups = jnp.pad(coupling, ((0, pad), (0, pad))), jnp.pad(groups, (0, pad))

    def round_block(index, carry):
        targets, codes = carry
        first = index * block
        own_targets, own_reference = (jax.lax.dynamic_slice_in_dim(a, first, block) for a in (targets, reference))
        own_grid = grid.of(jax.lax.dynamic_slice_in_dim(groups, first, block))
        columns = jax.lax.dynamic_slice_in_dim(coupling, first, block, axis=1)
        own_coupling = jax.lax.dynamic_slice_in_dim(columns, first, block)

        def round_input(i, carry):
            moved, own_codes = carry  # `moved` is 0 from i on, so that only inputs before it count
            target = own_targets[i] - jnp.tensordot(own_coupling[i], moved, 1, precision=HIGHEST)
            grid_of_input = own_grid.of(i)
            code = grid_of_input.codes(target)
            return moved.at[i].set(grid_of_input.numbers(code) - own_reference[i]), own_codes.at[i].set(code)

        start = jnp.zeros_like(own_targets), jnp.zeros((block, targets.shape[-1]), jnp.float32)
        moved, own_codes = jax.lax.fori_loop(0, block, round_input, start)
        targets = targets - jnp.tensordot(columns, moved, 1, precision=HIGHEST)
        return targets, jax.lax.dynamic_update_slice_in_dim(codes, own_codes.astype(jnp.uint8), first, axis=0)

    start = targets, jnp.zeros((k + pad, targets.shape[-1]), jnp.uint8)
    return jax.lax.fori_loop(0, (k + pad) // block, round_block, start)[1][:k]

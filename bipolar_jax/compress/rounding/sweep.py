"""The loop that GPTQ and coordinate descent share: inputs are rounded in turn, and each moves the targets of others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.compress.rounding.affine_grid import AffineGrid, NestedGrid

HIGHEST = jax.lax.Precision.HIGHEST
# Inputs of a step of the inner loop: a GPU starts four kernels a step. More take longer to compile, and on CPUs to run.
_UNROLLED = 4


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
    other targets follow at its end, in one matrix product (as in GPTQ, arXiv 2210.17323, section 3.3, step 2). Within a
    block runs of a few inputs do the same: a run is one step of a loop, and what an input does to the others of its run
    is elementwise.

    Args:
      targets: what each input would be rounded to if no other were rounded; for a nested grid one of each precision.
      reference: the numbers from which inputs move.
      coupling: only what is below its diagonal counts.
      grid: of every group.
      groups: the group of every input.
      block: inputs of a block, rounded up to whole runs.

    Returns:
      The codes.
    """
    run = min(_UNROLLED, block)
    block = -(-block // run) * run
    k = len(targets)
    pad = -k % block
    targets, reference = (jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for a in (targets, reference))
    coupling, groups = jnp.pad(coupling, ((0, pad), (0, pad))), jnp.pad(groups, (0, pad))

    def round_block(index, carry):
        targets, codes = carry
        first = index * block
        own_targets, own_reference, own_groups = (_slice(a, first, block) for a in (targets, reference, groups))
        columns = _slice(coupling, first, block, axis=1)
        own_coupling, own_grid = _slice(columns, first, block), grid.of(own_groups)

        def round_run(index, carry):
            moved, own_codes = carry  # `moved` is 0 from this run on, so that only inputs before it count
            first = index * run
            from_inputs = _slice(own_coupling, first, run)
            within = _slice(from_inputs, first, run, axis=1)
            run_targets = _slice(own_targets, first, run) - jnp.tensordot(from_inputs, moved, 1, precision=HIGHEST)
            run_reference = _slice(own_reference, first, run)
            run_grid = own_grid.of(first + jnp.arange(run))
            run_moved, run_codes = [], []
            for i in range(run):
                target = run_targets[i]
                for earlier in range(i):
                    target = target - within[i, earlier] * run_moved[earlier]
                grid_of_input = run_grid.of(i)
                run_codes.append(grid_of_input.codes(target))
                run_moved.append(grid_of_input.numbers(run_codes[-1]) - run_reference[i])
            return _put(moved, run_moved, first), _put(own_codes, run_codes, first)

        start = jnp.zeros_like(own_targets), jnp.zeros((block, targets.shape[-1]), jnp.float32)
        moved, own_codes = jax.lax.fori_loop(0, block // run, round_run, start)
        targets = targets - jnp.tensordot(columns, moved, 1, precision=HIGHEST)
        return targets, jax.lax.dynamic_update_slice_in_dim(codes, own_codes.astype(jnp.uint8), first, axis=0)

    start = targets, jnp.zeros((k + pad, targets.shape[-1]), jnp.uint8)
    return jax.lax.fori_loop(0, (k + pad) // block, round_block, start)[1][:k]


def _slice(array: Array, first: Int[Array, ""], size: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, first, size, axis)


def _put(array: Float[Array, "block ..."], rows: list[Float[Array, "..."]], first: Int[Array, ""]) -> Array:
    """The array with these rows from `first` on."""
    return jax.lax.dynamic_update_slice_in_dim(array, jnp.stack(rows), first, axis=0)

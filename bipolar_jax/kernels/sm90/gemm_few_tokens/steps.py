"""What a warpgroup does with a part of K, and with a tile that is summed, in the product of few tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import finish_groups_transposed, finish_transposed
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm_few_tokens.groups import DecodeGroups, add_decode_group


def multiply_part(recovery: Recovery, planes: list[int], width: int, operands, refill, emulate: bool, part=(0, 1)):
    """sum_i p_i t_i over one part of K, or a part of that, int32 [64, columns].

    Args:
      recovery: the planes' weights.
      planes: of the weights, the heaviest first.
      width: columns of one plane of the tokens.
      operands: waits for the number-th of them; gives refs [64, 32 words] and [x_planes, width, 32 words].
      refill: loads what follows into the slot of the number-th.
      emulate: whether this is interpret mode.
    """
    weights = [recovery.w_format.plane_weights[plane] for plane in planes]
    acc = None
    for number, weight in enumerate(weights):
        if acc is None:
            w_tile, x_tile = operands(number)
            shape = (ROWS_PER_INSTRUCTION, x_tile.shape[0] * width)
            acc = wgmma.start(shape, w_tile, x_tile, "planes", part=part)
        else:
            acc = wgmma.begin(acc * (weights[number - 1] // weight))
            acc = wgmma.accumulate(acc, *operands(number), "planes", part=part)
        acc = wgmma.settle(acc)
        refill(number)
    return acc


def sum_columns(acc, split: int, recovery: Recovery, width: int):
    """sum_j q_j of the columns of plane j, of one group of those that share the instruction: int32 [64, width]."""
    weights = recovery.a_format.plane_weights
    starts = [(split * len(weights) + j) * width for j in range(len(weights))]
    blocks = [lax.slice(acc, (0, start), (acc.shape[0], start + width)) for start in starts]
    return functools.reduce(jnp.add, (block * weight for block, weight in zip(blocks, weights, strict=True)))


def add_groups(total, groups: DecodeGroups, load_terms, zero_code, recovery, planes, width, operands, refill, emulate):
    """Adds a part of K, group by group, to the scaled sum, float32 [64, width].

    Args:
      total: the sum.
      groups: their terms in memory.
      load_terms: gives those of a piece of the part.
      zero_code: of the tokens.
      recovery, planes, width, operands, refill, emulate: as in `multiply_part`.
    """
    tiles = [operands(number) for number in range(len(planes))]

    def add_piece(piece, total):
        terms = load_terms(piece)
        acc = multiply_part(
            recovery, planes, width, tiles.__getitem__, lambda _: None, emulate, part=(piece, groups.pieces)
        )
        for split, of_group in enumerate(terms):
            total = add_decode_group(sum_columns(acc, split, recovery, width), total, of_group, zero_code, recovery)
        return total

    total = lax.fori_loop(0, groups.pieces, add_piece, total)
    for number in range(len(planes)):
        refill(number)
    return total


def finish_tile(
    total, recovery, tiling, dtype, terms, columns_arrived, out, last, *, handed_over, all_handed_over, taken, staging
):
    """Adds what the other warpgroups summed, completes and stores the columns of a tile.

    Args:
      total: this warpgroup's sum, int32 [64, width].
      recovery, tiling, dtype: as in `decode_matmul`.
      terms: of tokens and columns, in shared memory.
      columns_arrived: barrier of the latter.
      out: [width, 64] in memory.
      last: whether no tile follows.
      handed_over, all_handed_over, taken: where the others' sums are, and barriers for both ways.
      staging: [width, 64] in shared memory.
    """
    if tiling.warpgroups > 1:
        plgpu.barrier_wait(all_handed_over)
        for other in range(tiling.warpgroups - 1):
            layout = wgmma.ACCUMULATOR if handed_over.dtype == jnp.int32 else plgpu.Layout.WGMMA
            total = total + plgpu.load(handed_over.at[other], layout=layout, optimized=False)
        plgpu.barrier_arrive(taken, predicate=jnp.logical_not(last))
    if jax.tree.leaves(terms[1]):
        plgpu.barrier_wait(columns_arrived)
    finish = finish_transposed if handed_over.dtype == jnp.int32 else finish_groups_transposed
    finished = finish(plgpu.layout_cast(total, plgpu.Layout.WGMMA), recovery, *terms)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    # Registers of one number each, as rows of the output are columns here.
    staging_rows = staging.transpose((1, 0))
    staging_rows[...] = plgpu.layout_cast(finished, wgmma.ACCUMULATOR).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)

"""The steps of a warpgroup in the product of few tokens: multiply a slice of K, add groups, finish a tile."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import finish_transposed
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.arithmetic.scaled_epilogue import finish_groups_transposed
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm_few_tokens.groups import DecodeGroups, add_decode_group


def multiply_slice(recovery: Recovery, planes: list[int], width: int, operands, refill, part=(0, 1)):
    """sum_i p_i t_i over one slice of K, or over the i-th of n parts of it, part = (i, n): int32 [64, columns].

    Args:
      recovery: the planes' weights. planes: of the weights, the heaviest first. width: columns of one plane of the
      tokens. operands: operands(i) waits for the i-th of the planes; returns refs [64, 32 words] and [x_planes, width,
      32 words]. refill: refill(i) loads the next tile into the slot of the i-th.
    """
    weights = [recovery.w_format.plane_weights[plane] for plane in planes]
    acc = None
    for i, weight in enumerate(weights):
        if acc is None:
            w_tile, x_tile = operands(i)
            shape = (ROWS_PER_INSTRUCTION, x_tile.shape[0] * width)
            acc = wgmma.start(shape, w_tile, x_tile, "planes", part=part)
        else:
            acc = wgmma.begin(acc * (weights[i - 1] // weight))
            acc = wgmma.accumulate(acc, *operands(i), "planes", part=part)
        acc = wgmma.settle(acc)
        refill(i)
    return acc


def sum_columns(acc, group: int, recovery: Recovery, width: int):
    """sum_j q_j times the columns of plane j, of one of the groups that share the instruction: int32 [64, width]."""
    weights = recovery.a_format.plane_weights
    starts = [(group * len(weights) + j) * width for j in range(len(weights))]
    blocks = [lax.slice(acc, (0, start), (acc.shape[0], start + width)) for start in starts]
    return functools.reduce(jnp.add, (block * weight for block, weight in zip(blocks, weights, strict=True)))


def add_groups(total, groups: DecodeGroups, load_terms, zero_code, recovery, planes, width, operands, refill):
    """Adds a slice of K, group by group, to the scaled sum, float32 [64, width].

    Args:
      total: the sum.
      groups: their terms in global memory.
      load_terms: load_terms(i) loads the terms of the i-th product of the slice.
      zero_code: of the tokens.
      recovery, planes, width, operands, refill: as in `multiply_slice`.
    """
    tiles = [operands(i) for i in range(len(planes))]

    def add_product(product, total):
        terms = load_terms(product)
        part = (product, groups.products_per_slice)
        acc = multiply_slice(recovery, planes, width, tiles.__getitem__, lambda _: None, part)
        for group, group_terms in enumerate(terms):
            sums = sum_columns(acc, group, recovery, width)
            total = add_decode_group(sums, total, group_terms, zero_code, recovery)
        return total

    total = lax.fori_loop(0, groups.products_per_slice, add_product, total)
    for i in range(len(planes)):
        refill(i)
    return total


def finish_tile(
    total, recovery, tiling, dtype, terms, columns_arrived, out, last, *, partial_sums, all_summed, sums_read, staging
):
    """Adds the other warpgroups' sums, applies the epilogue, and stores a tile.

    Args:
      total: this warpgroup's sum, int32 [64, width].
      recovery, tiling, dtype: as in `decode_matmul`.
      terms: (tokens, columns), the epilogue's vectors in shared memory.
      columns_arrived: mbarrier of the columns' terms.
      out: [width, 64] in global memory.
      last: whether no tile follows.
      partial_sums: [warpgroups - 1, 64, width] in shared memory, the other warpgroups' sums.
      all_summed, sums_read: mbarriers: the sums are complete; they may be overwritten.
      staging: [width, 64] in shared memory.
    """
    if tiling.warpgroups > 1:
        plgpu.barrier_wait(all_summed)
        for other in range(tiling.warpgroups - 1):
            layout = wgmma.ACCUMULATOR if partial_sums.dtype == jnp.int32 else plgpu.Layout.WGMMA
            total = total + plgpu.load(partial_sums.at[other], layout=layout, optimized=False)
        plgpu.barrier_arrive(sums_read, predicate=jnp.logical_not(last))
    if jax.tree.leaves(terms[1]):
        plgpu.barrier_wait(columns_arrived)
    finish = finish_transposed if partial_sums.dtype == jnp.int32 else finish_groups_transposed
    finished = finish(plgpu.layout_cast(total, plgpu.Layout.WGMMA), recovery, *terms)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    # The accumulator's columns are rows of the output, so that each register is stored by itself.
    staging_rows = staging.transpose((1, 0))
    staging_rows[...] = plgpu.layout_cast(finished, wgmma.ACCUMULATOR).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)

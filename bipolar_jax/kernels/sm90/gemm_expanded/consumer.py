"""The consumer warpgroups: they expand and multiply tiles, finish the numbers in registers, and hand them on.

As in `gemm.consumer`, but the rows of an accumulator are columns of the output, and its columns tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import activate, finish_floats, finish_transposed
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.arithmetic.scaled_epilogue import finish_scaled_transposed
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish, Output
from bipolar_jax.kernels.sm90.gemm.problem import TileOrigin
from bipolar_jax.kernels.sm90.gemm_expanded.floats.multiply import FloatMultiplication
from bipolar_jax.kernels.sm90.gemm_expanded.multiply import ByteMultiplication, Multiplication, multiply_half, zeros
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.scaled_multiply import ChunkScaling, add_pending, add_stage
from bipolar_jax.kernels.sm90.gemm_expanded.scaled_multiply import zeros as scaled_zeros
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALVES, Expansion
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.kernels.sm90.prepared_weights.scaled_floats import ScaledFloatExpansion

# Stages of the mainloop with float scales of groups that an iteration unrolls, by tokens of a tile; ptxas spills two of
# 128 tokens.
_SCALED_STAGES = {64: 2, 128: 1}


def consume(problem: ExpandedProblem, output: Output, targets, scratch, output_scratch: dict) -> None:
    """Multiplies and finishes this consumer's tiles.

    Args:
      problem: sizes and order.
      output: what becomes of finished numbers; its arrays are refs in memory.
      targets: refs of the arrays that `output.out_types` names.
      scratch: `smem.Scratch`.
      output_scratch: refs of what `output.scratch` names.
    """
    tiling = problem.tiling
    consumer = lax.axis_index("warpgroup")
    writer = output.writer(problem, targets, output_scratch, consumer)
    # This consumer's share of a block's tile.
    tokens = pl.ds(consumer * tiling.tile_m if tiling.schedule == "split_m" else 0, tiling.tile_m)
    weight_tile = consumer if tiling.schedule == "split_n" else 0
    columns = pl.ds(weight_tile * tiling.tile_n, tiling.tile_n)
    out_column = weight_tile * problem.out_tile_n
    first = consumer if tiling.tiles_in_progress > 1 else 0
    total_steps = problem.tiles_of_cluster() * problem.steps_per_tile

    def release(step, slot, *, only_if=True):
        """Lets the producer refill a stage, if a later step needs it: nobody may arrive at a block that has ended."""
        plgpu.barrier_arrive(scratch.empty.at[slot], predicate=(step + tiling.slots < total_steps) & only_if)

    def operands(slot, half=0):
        terms = None if scratch.group_terms is None else scratch.group_terms.at[slot, weight_tile]
        token_tile = half * problem.token_tiles // HALVES
        shared = scratch.tokens.at[slot, token_tile, tokens], scratch.words.at[slot, weight_tile], terms
        return shared if scratch.token_sums is None else (*shared, scratch.token_sums.at[slot])

    def end_stage(step):
        """Lets the second consumer begin once the first is ahead by the lag."""
        if scratch.lagged is not None:
            plgpu.barrier_arrive(scratch.lagged, predicate=(step == problem.stages_of_lag - 1) & (consumer == 0))

    mainloop = _sum_scaled_stages if problem.scales_sums else _sum_stages
    writer.start()
    if scratch.lagged is not None:

        @when(consumer > 0)
        def _():
            plgpu.barrier_wait(scratch.lagged)

    def tile(iteration, carry):
        index = first + iteration * tiling.tiles_in_progress
        step = index * problem.steps_per_tile
        sequence, token, column = problem.block_origin(index)
        origin = TileOrigin(sequence, token + tokens.start, column + out_column)
        writer.preload(origin)
        total = mainloop(
            problem,
            step,
            lax.rem(step, tiling.slots),
            wait=lambda slot: plgpu.barrier_wait(scratch.full.at[problem.full_barrier(index, slot)]),
            operands=operands,
            release=release,
            end_stage=end_stage,
        )
        with jax.named_scope("epilogue"):
            buffer = problem.terms_buffer(index)
            plgpu.barrier_wait(scratch.terms_full.at[buffer])
            token_terms, column_terms = (
                jax.tree.map(lambda ref, own=own: ref.at[buffer, own], terms)
                for terms, own in zip(scratch.terms, (tokens, columns), strict=True)
            )
            writer.store(origin, _finisher(problem, output, writer.finish_shape, total, token_terms, column_terms))

            @when(index + tiling.tiles_in_progress < problem.tiles_of_cluster())
            def _():
                plgpu.barrier_arrive(scratch.terms_empty.at[buffer])

        return carry

    my_tiles = lax.div(problem.tiles_of_cluster() - first + tiling.tiles_in_progress - 1, tiling.tiles_in_progress)
    lax.fori_loop(0, my_tiles, tile, ())
    # Shared memory must outlive the copies that read it. The end of the kernel waits for what they write.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum_stages(problem: ExpandedProblem, step, slot, *, wait, operands, release, end_stage):
    """The sum over all of K of one tile, int32 [TILE_ROWS, tile_m], or of floats float32.

    Two commit groups are in flight, also across the loop's back edge, while the next is expanded.

    Args:
      problem: the static side.
      step, slot: the tile's first step, and the stage that it is in.
      wait: waits until a stage is loaded.
      operands: refs of the tokens of half a stage, and of the stage's words and terms.
      release: lets the producer refill a stage.
      end_stage: called with every step whose products have been issued.
    """
    multiplication = _multiplication(problem)

    def multiply(position, carry):
        acc, step, slot, previous = carry
        wait(slot)
        acc = multiply_half(acc, *operands(slot, 0), multiplication, half=0)
        # Groups of this stage alone are in flight: the products of the stage before have ended.
        release(step - 1, previous, only_if=position > 0)
        acc = multiply_half(acc, *operands(slot, 1), multiplication, half=1)
        end_stage(step)
        return acc, step + 1, problem.next_slot(slot), slot

    with jax.named_scope("mainloop"):
        carry = zeros(problem.tiling.tile_m, multiplication.kind), step, slot, slot
        acc, step, slot, last = lax.fori_loop(0, problem.steps_over_k, multiply, carry)
        acc = wgmma.settle(acc)
        release(step - 1, last)
    return acc


def _multiplication(problem: ExpandedProblem) -> Multiplication:
    """What the tensor cores multiply where sums run over all of K."""
    if not problem.is_float:
        return ByteMultiplication(Expansion(problem.w_bits, problem.chunks))
    expansion = FloatExpansion if problem.float_terms is None else ScaledFloatExpansion
    recovery = problem.recovery
    return FloatMultiplication(expansion(recovery.w_format, problem.chunks, FLOATS[recovery.kind]))


def _sum_scaled_stages(problem: ExpandedProblem, step, slot, *, wait, operands, release, end_stage):
    """The scaled sum over all of K of one tile, float32 [TILE_ROWS, tile_m] in units of SUM_UNIT.

    A unit of products is in flight while the one before is scaled, but not across the back edge of the loop. Arguments
    as `_sum_stages` has them; `operands` has a stage's sums of tokens last.
    """
    scaling = ChunkScaling(problem.recovery.w_format, problem.float_terms, problem.chunks)

    def add_stages(count, carry):
        total, step, slot = carry
        before = previous = None
        for _ in range(count):
            wait(slot)
            pending, total = add_stage(total, *operands(slot), scaling, before)
            if previous is not None:
                release(step - 1, previous)
            end_stage(step)
            before, previous, step, slot = (pending, operands(slot)[2]), slot, step + 1, problem.next_slot(slot)
        total = add_pending(before[0], total, before[1], scaling)
        release(step - 1, previous)
        return total, step, slot

    stages = _SCALED_STAGES[problem.tiling.tile_m]
    iterations, rest = divmod(problem.steps_over_k, stages)
    with jax.named_scope("mainloop"):
        carry = scaled_zeros(problem.tiling.tile_m), step, slot
        carry = lax.fori_loop(0, iterations, lambda _, carry: add_stages(stages, carry), carry)
        total, _, _ = add_stages(rest, carry) if rest else carry
    return total


def _finisher(problem: ExpandedProblem, output: Output, finish_shape, total, tokens, columns) -> Finish:
    """The function that makes finished numbers of the mainloop's sums: scales, bias, activation, cast.

    Of a split of K the sums themselves are what the output gets.

    Args:
      problem: the static side.
      output: whose dtype the numbers have.
      finish_shape: rows and columns of the accumulator to finish at once.
      total: [TILE_ROWS, tile_m], the sums.
      tokens, columns: terms, refs [tile_m] and [TILE_ROWS] in shared memory.
    """

    def end(column):
        """Of a chunk along the tokens; the tile's last may be narrower."""
        return min(column + finish_shape[1], problem.tiling.tile_m)

    def sums(row, column):
        return plgpu.layout_cast(
            lax.slice(total, (row, column), (row + finish_shape[0], end(column))), plgpu.Layout.WGMMA
        )

    finish = finish_scaled_transposed if problem.scales_sums else finish_transposed
    if problem.is_float:
        finish = finish_floats

    def scaled(row, column):
        row_range, column_range = pl.ds(row, finish_shape[0]), pl.ds(column, end(column) - column)
        return finish(
            sums(row, column),
            problem.recovery,
            jax.tree.map(lambda ref: ref.at[column_range], tokens),
            jax.tree.map(lambda ref: ref.at[row_range], columns),
        )

    def finished(row, column):
        # Gates are the first rows of a tile, their values the rows `out_tile_n` later.
        factors = [scaled(row + factor * problem.out_tile_n, column) for factor in range(problem.factors)]
        if problem.activation is None:
            return factors[0].astype(output.dtype)
        if problem.is_float and problem.recovery.rounds_product:
            factors = [factor.astype(output.dtype).astype(jnp.float32) for factor in factors]
        return activate(problem.activation, factors, output.dtype)

    return finished if problem.splits == 1 else sums

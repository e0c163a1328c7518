"""The consumer warpgroups: they multiply tiles, finish the numbers in registers, and hand them to the output.

`_finisher` finishes numbers: correction, scales, bias and activation. What happens to finished numbers, such as adding
a residual, is up to the output (`outputs/`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import (
    GroupTerms,
    activate,
    add_group,
    finish,
    finish_grouped,
)
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish, Output
from bipolar_jax.kernels.sm90.gemm.problem import Problem, TileOrigin


def consume(problem: Problem, output: Output, targets, scratch, output_scratch: dict) -> None:
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
    rows = pl.ds(consumer * tiling.tile_m if tiling.schedule == "split_m" else 0, tiling.tile_m)
    columns = pl.ds(consumer * tiling.tile_n if tiling.schedule == "split_n" else 0, tiling.tile_n)
    first = consumer if tiling.tiles_in_progress > 1 else 0
    total_steps = problem.tiles_of_cluster() * problem.steps_per_tile

    def release(step, slot, *, only_if=True):
        """Lets the producer refill a stage, if a later step needs it: nobody may arrive at a block that has ended.

        Predicated rather than branched over: LLVM would peel a loop whose first iteration differs, and the copies
        cost registers.
        """
        plgpu.barrier_arrive(scratch.empty.at[slot], predicate=(step + tiling.slots < total_steps) & only_if)

    def operands(slot):
        return scratch.tiles[0].at[slot, rows], scratch.tiles[1].at[slot, columns]

    def group_terms(slot, group):
        terms = scratch.group_terms
        return GroupTerms(
            scale=terms.scale.at[slot, group, columns],
            offset=None if terms.offset is None else terms.offset.at[slot, group, columns],
            token_sums=None if terms.token_sums is None else terms.token_sums.at[slot, group, rows],
        )

    mainloop = _sum_pairs if scratch.group_terms is None else _sum_groups
    writer.start()

    def tile(iteration, carry):
        index = first + iteration * tiling.tiles_in_progress
        step = index * problem.steps_per_tile
        sequence, token, column = problem.block_origin(index)
        origin = TileOrigin(sequence, token + rows.start, column + columns.start // problem.factors)
        writer.preload(origin)
        total = mainloop(
            problem,
            step,
            lax.rem(step, tiling.slots),
            wait=lambda slot: plgpu.barrier_wait(scratch.full.at[problem.full_barrier(index, slot)]),
            operands=operands,
            group_terms=group_terms,
            release=release,
        )
        with jax.named_scope("epilogue"):
            buffer = problem.terms_buffer(index)
            plgpu.barrier_wait(scratch.terms_full.at[buffer])
            tokens, out_columns = (
                jax.tree.map(lambda ref, own=own: ref.at[buffer, own], terms)
                for terms, own in zip(scratch.terms, (rows, columns), strict=True)
            )
            writer.store(origin, _finisher(problem, output, writer.finish_shape, total, tokens, out_columns))

            @pl.when(index + tiling.tiles_in_progress < problem.tiles_of_cluster())
            def _():
                plgpu.barrier_arrive(scratch.terms_empty.at[buffer])

        return carry

    my_tiles = (problem.tiles_of_cluster() - first + tiling.tiles_in_progress - 1) // tiling.tiles_in_progress
    lax.fori_loop(0, my_tiles, tile, ())
    # Shared memory must outlive the copies that read it. The end of the kernel waits for what they write.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _finisher(problem: Problem, output: Output, finish_shape: tuple[int, int], total, tokens, columns) -> Finish:
    """The function that makes finished numbers of the mainloop's sums: scales, bias, activation, cast.

    Of a split of K the sums themselves are what the output gets.

    Args:
      problem: the static side.
      output: whose dtype the numbers have.
      finish_shape: rows and columns of the accumulator to finish at once.
      total: [tile_m, tile_n], the sums.
      tokens, columns: terms, refs [tile_m] and [tile_n] in shared memory.
    """
    finish_sums = finish if problem.group_size is None else finish_grouped

    def sums(row, column):
        end = row + finish_shape[0], column + finish_shape[1]
        return plgpu.layout_cast(lax.slice(total, (row, column), end), plgpu.Layout.WGMMA)

    def scaled(row, column):
        row_range, column_range = pl.ds(row, finish_shape[0]), pl.ds(column, finish_shape[1])
        return finish_sums(
            sums(row, column),
            problem.recovery,
            jax.tree.map(lambda ref: ref.at[row_range], tokens),
            jax.tree.map(lambda ref: ref.at[column_range], columns),
            output.dtype if problem.activation is None else jnp.float32,
        )

    def finished(row, column):
        factors = [scaled(row, column + factor * problem.out_tile_n) for factor in range(problem.factors)]
        return factors[0] if problem.activation is None else activate(problem.activation, factors, output.dtype)

    return finished if problem.splits == 1 else sums


def _sum_pairs(problem: Problem, step, slot, *, wait, operands, group_terms, release):
    """The sum over all pairs of planes and all of K of one tile, [tile_m, tile_n], by Horner's rule.

    Args:
      problem: the static side.
      step, slot: the tile's first step, and the stage that it is in.
      wait: waits until a stage is loaded.
      operands: refs of a stage's operand tiles.
      group_terms: for the signature of `_sum_groups`.
      release: lets the producer refill a stage.
    """
    del group_terms
    acc = wgmma.zeros(problem.tiling.tile_m, problem.tiling.tile_n, problem.recovery.kind)
    for factor, pairs in problem.recovery.pair_groups():
        acc = wgmma.begin(acc if factor == 1 else acc * factor)

        def multiply(position, carry):
            acc, step, slot, previous = carry
            wait(slot)
            acc = wgmma.accumulate(acc, *operands(slot), problem.recovery.kind)
            # All instructions but the group just issued are done: the stage they read is free.
            plgpu.wgmma_wait(1)
            release(step - 1, previous, only_if=position > 0)
            return acc, step + 1, problem.next_slot(slot), slot

        with jax.named_scope("mainloop"):
            steps = len(pairs) * problem.steps_over_k
            acc, step, slot, last = lax.fori_loop(0, steps, multiply, (acc, step, slot, slot))
            acc = wgmma.settle(acc)
            release(step - 1, last)
    return acc


def _sum_groups(problem: Problem, step, slot, *, wait, operands, group_terms, release):
    """sum_g scale_g * (sum over the K of group g) of one tile, float32 [tile_m, tile_n]; arguments as `_sum_pairs`.

    The tensor cores multiply the next group while one is scaled, but not across the back edge of a loop: there LLVM
    copies what the loop carries, and accumulators in flight must not be touched.
    """
    groups_per_step = problem.groups_per_step
    shape = (problem.tiling.tile_m, problem.tiling.tile_n)

    def start(slot, group):
        """Starts a group: its first step, or its part of a step."""
        if group == 0:
            wait(slot)
        return wgmma.start(shape, *operands(slot), problem.recovery.kind, part=(group, groups_per_step))

    def finish_group(acc, step, slot):
        """Issues the other steps of a group. Returns also its last step and that step's stage, which has its terms."""
        for _ in range(problem.steps_per_group - 1):
            before, slot, step = slot, problem.next_slot(slot), step + 1
            wait(slot)
            acc = wgmma.accumulate(acc, *operands(slot), problem.recovery.kind)
            plgpu.wgmma_wait(1)
            release(step - 1, before)
        return acc, step, slot

    def add_groups(_, carry):
        total, step, slot = carry
        acc, step, slot = finish_group(start(slot, 0), step, slot)
        for number in range(problem.groups_per_iteration):
            group, next_group = number % groups_per_step, (number + 1) % groups_per_step
            is_last = number == problem.groups_per_iteration - 1
            next_step, next_slot = (step + 1, problem.next_slot(slot)) if next_group == 0 else (step, slot)
            if not is_last:
                next_acc = start(next_slot, next_group)
            acc = wgmma.settle(acc, in_flight=0 if is_last else 1)
            total = add_group(acc, total, group_terms(slot, group), problem.recovery.product_weight)
            if next_group == 0:
                # The terms were read by ordinary loads, which the producer's next TMA write must come after.
                plgpu.commit_smem()
                release(step, slot)
            step, slot = next_step, next_slot
            if not is_last:
                acc, step, slot = finish_group(next_acc, step, slot)
        return total, step, slot

    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    with jax.named_scope("mainloop"):
        total, _, _ = lax.fori_loop(0, problem.group_iterations, add_groups, (total, step, slot))
    return total

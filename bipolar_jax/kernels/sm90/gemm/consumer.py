"""The warpgroups that multiply and finish tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import GroupTerms, activate, add_group, finish, finish_grouped
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.gemm.outputs.dense import OutputPieces
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import clear_rest
from bipolar_jax.kernels.sm90.gemm.outputs.heads import HeadPieces
from bipolar_jax.kernels.sm90.gemm.outputs.signs import SignPieces
from bipolar_jax.kernels.sm90.gemm.problem import Work


def consume(
    work: Work, out, staging, residual, arrived, *, tiles, group_terms, terms, full, empty, terms_full, terms_empty
):
    """Multiplies and finishes this consumer's tiles.

    Args:
      work: the static side.
      out: [m, n] in memory; or `HeadTargets`, for `work.heads`; or `SignTargets`, for `work.as_signs`.
      staging: [consumers, slots, 64, width] in shared memory, for pieces of the output; None for signs.
      residual: [m, n] in memory, or None.
      arrived: barriers of all consumers' staging slots, of what arrives there, if anything does.
      **shared: with the producer, see `producer.produce`.
    """
    tiling = work.tiling
    me = lax.axis_index("warpgroup")
    # This consumer's part of a block's tile.
    rows = pl.ds(me * tiling.tile_m if tiling.schedule == "split_m" else 0, tiling.tile_m)
    columns = pl.ds(me * tiling.tile_n if tiling.schedule == "split_n" else 0, tiling.tile_n)
    first = me if work.tiles_at_a_time > 1 else 0
    total_steps = work.my_tiles() * work.steps_per_tile

    def release(step, slot, *, only_if=True):
        """Lets the producer refill the slot, if it will: nobody must arrive on a block that is gone.

        Predicated, not branched over: LLVM would peel a loop whose first turn differs, and the copies
        cost registers.
        """
        plgpu.barrier_arrive(empty.at[slot], predicate=(step + tiling.slots < total_steps) & only_if)

    def operands(slot):
        return tiles[0].at[slot, rows], tiles[1].at[slot, columns]

    mainloop = _sum_pairs if group_terms is None else _sum_groups
    if work.heads is not None:
        clear_rest(work.heads, work.sequences, work.covered_rows, staging.at[me], out, *work.consumer_of_all(me))

    def tile(turn, carry):
        index = first + turn * work.tiles_at_a_time
        step = index * work.steps_per_tile
        sequence, m_start, n_start = work.origin(index)
        row, column = m_start + rows.start, n_start + columns.start // work.parts
        arrivals = None
        if arrived is not None:
            slots = staging.shape[1]
            arrivals = [arrived.at[me * slots + slot] for slot in range(slots)]
        if work.heads is not None:
            length = work.m if work.m < work.covered_rows else None
            origin = (sequence, row, column)
            pieces = HeadPieces(work.heads, rows.size, columns.size, staging.at[me], out, origin, length, arrivals)
        elif work.as_signs:
            pieces = SignPieces(work.sign_threads, tiling.tile_m, out, (row, column), work.emulate)
        else:
            at = pl.ds(row, rows.size), pl.ds(column, work.out_tile_n)
            added = None if residual is None else residual.at[at]
            pieces = OutputPieces(
                tiling.tile_m, work.out_tile_n, work.parts, staging.at[me], out.at[at], added, arrivals
            )
        if arrived is not None:
            pieces.start()
        total = mainloop(
            work,
            step,
            lax.rem(step, tiling.slots),
            wait=lambda slot: plgpu.barrier_wait(full.at[work.full_barrier(index, slot)]),
            operands=operands,
            group_terms_of=lambda slot, part: GroupTerms(
                scale=group_terms.scale.at[slot, part, columns],
                offset=None if group_terms.offset is None else group_terms.offset.at[slot, part, columns],
                token_sums=None if group_terms.token_sums is None else group_terms.token_sums.at[slot, part, rows],
            ),
            release=release,
        )
        with jax.named_scope("epilogue"):
            buffer = work.buffer(index)
            plgpu.barrier_wait(terms_full.at[buffer])
            _store(
                work,
                total,
                [
                    jax.tree.map(lambda ref, part=part: ref.at[buffer, part], some)
                    for some, part in zip(terms, (rows, columns), strict=True)
                ],
                pieces,
            )

            @pl.when(index + work.tiles_at_a_time < work.my_tiles())
            def _():
                plgpu.barrier_arrive(terms_empty.at[buffer])

        return carry

    my_turns = (work.my_tiles() - first + work.tiles_at_a_time - 1) // work.tiles_at_a_time
    lax.fori_loop(0, my_turns, tile, ())
    # Shared memory must outlive the copies that read it; what they write is there when the kernel ends.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum_pairs(work: Work, step, slot, *, wait, operands, group_terms_of, release):
    """The sum over all plane pairs and all of K of one tile, int32 [tile_m, tile_n], by Horner's rule."""
    del group_terms_of
    acc = wgmma.zeros(work.tiling.tile_m, work.tiling.tile_n)
    for factor, pairs in work.recovery.pair_groups():
        acc = wgmma.begin(acc if factor == 1 else acc * factor)

        def multiply(position, carry):
            acc, step, slot, previous = carry
            wait(slot)
            acc = wgmma.accumulate(acc, *operands(slot), work.recovery.kind)
            # All but the group just issued are done, and the slot they read is free.
            plgpu.wgmma_wait(1)
            release(step - 1, previous, only_if=position > 0)
            return acc, step + 1, work.next_slot(slot), slot

        with jax.named_scope("mainloop"):
            acc, step, slot, last = lax.fori_loop(0, len(pairs) * work.k_blocks, multiply, (acc, step, slot, slot))
            acc = wgmma.settle(acc)
            release(step - 1, last)
    return acc


def _sum_groups(work: Work, step, slot, *, wait, operands, group_terms_of, release):
    """sum_g scale_g * (sum over the K of group g) of one tile, float32 [tile_m, tile_n].

    The next group is multiplied while one is scaled, but not across the ends of a loop: there LLVM
    copies what the loop carries, and accumulators in use must not be touched.
    """
    parts = work.groups_per_step
    shape = (work.tiling.tile_m, work.tiling.tile_n)

    def start(slot, part):
        """Starts a group: its first step, or its part of a step."""
        if part == 0:
            wait(slot)
        return wgmma.start(shape, *operands(slot), work.recovery.kind, part=(part, parts))

    def go_on(acc, step, slot):
        """The other steps of a group. Returns also its last step and slot, which has its terms."""
        for _ in range(work.steps_per_group - 1):
            before, slot, step = slot, work.next_slot(slot), step + 1
            wait(slot)
            acc = wgmma.accumulate(acc, *operands(slot), work.recovery.kind)
            plgpu.wgmma_wait(1)
            release(step - 1, before)
        return acc, step, slot

    def turn(_, carry):
        total, step, slot = carry
        acc, step, slot = go_on(start(slot, 0), step, slot)
        for number in range(work.groups_per_turn):
            part, next_part = number % parts, (number + 1) % parts
            last = number == work.groups_per_turn - 1
            next_step, next_slot = (step + 1, work.next_slot(slot)) if next_part == 0 else (step, slot)
            if not last:
                next_acc = start(next_slot, next_part)
            acc = wgmma.settle(acc, in_flight=0 if last else 1)
            total = add_group(acc, total, group_terms_of(slot, part), work.recovery.product_weight)
            if next_part == 0:
                # The terms were read by ordinary loads, which the next TMA write must come after.
                plgpu.commit_smem()
                release(step, slot)
            step, slot = next_step, next_slot
            if not last:
                acc, step, slot = go_on(next_acc, step, slot)
        return total, step, slot

    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    with jax.named_scope("mainloop"):
        total, _, _ = lax.fori_loop(0, work.turns, turn, (total, step, slot))
    return total


def _store(work: Work, total, terms, pieces: OutputPieces | HeadPieces | SignPieces):
    """Finishes a tile piece by piece.

    Args:
      work: the static side.
      total: [tile_m, tile_n], what the mainloop summed.
      terms: of tokens and columns, refs [tile_m] and [tile_n] in shared memory.
      pieces: where they go.
    """
    tokens, columns = terms

    stored_as_finished = work.activation is None and work.heads is None

    def scaled(row, column):
        """What begins there of the product, [rows_at_once, width]."""
        part = (pl.ds(row, pieces.rows_at_once), pl.ds(column, pieces.width))
        return (finish if work.group_size is None else finish_grouped)(
            plgpu.layout_cast(
                lax.slice(total, (row, column), (row + pieces.rows_at_once, column + pieces.width)), plgpu.Layout.WGMMA
            ),
            work.recovery,
            jax.tree.map(lambda ref: ref.at[part[0]], tokens),
            jax.tree.map(lambda ref: ref.at[part[1]], columns),
            work.dtype if stored_as_finished else jnp.float32,
        )

    def finished(row, column):
        """What begins there of the output."""
        parts = [scaled(row, column + part * work.out_tile_n) for part in range(work.parts)]
        return parts[0] if work.activation is None else activate(work.activation, parts, work.dtype)

    pieces.store(finished)

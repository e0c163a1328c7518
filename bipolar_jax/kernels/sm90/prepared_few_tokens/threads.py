"""What single threads do in the product of few tokens: expand, multiply, add up, and store.

A warp multiplies one part of the weights, 32 rows, with all tokens: the rows of either block of the part are those of
an instruction, and tokens its columns. Its accumulators are, for either block and every eight tokens, sums of rows r
and r + 8 and tokens 2 q and 2 q + 1, in the lane 4 r + q.

The functions use `core.ptx` alone, so that tests run them for all threads in numpy.
"""

from __future__ import annotations

import functools

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import WARPS, lane_and_warp, thread_index
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import GLOBAL, SHARED, Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import CHUNK, FINISH_ROWS, LATE_TERMS, RUN, FewTokensProblem
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import FloatScaling, chunk_pieces
from bipolar_jax.packing.fields import PART_ROWS, PARTS, WORDS_PER_VECTOR

_SEGMENT = 16  # bytes: half of a step of one token
_ROWS_OF_SWIZZLE = 8
_MOST_KEPT_BITS = 4  # of codes that half a stage keeps for all tokens, beside terms that take arithmetic
Sums = list[Value]


def worker(problem: FewTokensProblem, warpgroup: Value, warp: Value) -> tuple[Value, Value, Value]:
    """This warp's index in the block, its part of the unit, and the first of its stages of a slot."""
    index = ptx.plus(ptx.times(warpgroup, WARPS), warp)
    split = ptx.divided(index, problem.tiling.parts)
    return index, ptx.plus(index, ptx.times(split, -problem.tiling.parts)), split


def multiply_slot(problem: FewTokensProblem, sums: Sums, words, terms, tokens, warpgroup: Value) -> Sums:
    """Adds this warp's stages of a slot.

    Args:
      problem: the static side.
      sums: of this warp.
      words: uint32 [parts, stages, bits, WORDS_PER_VECTOR] in shared memory.
      terms: uint32 [parts, term_stages, vectors, vector_words] in shared memory, or None.
      tokens: uint32 [tokens, token_rows, 32] in shared memory, swizzled.
      warpgroup: of the calling threads.
    """
    tiling = problem.tiling
    lane, warp = lane_and_warp()
    index, part, split = worker(problem, warpgroup, warp)
    expansion = Expansion(problem.w_bits, problem.chunks)

    def add_stages() -> Sums:
        total = list(sums)
        for turn in range(tiling.depth):
            stage = ptx.plus(split, tiling.splits * turn)
            my_words = stage_of_part(words, part, stage, tiling.stages, 4 * problem.w_bits * WORDS_PER_VECTOR)
            my_terms = (
                None
                if terms is None
                else stage_of_part(terms, part, stage, problem.term_stages, 4 * problem.term_words)
            )
            load = _token_loader(problem, ptx.pointer(tokens, SHARED), lane, stage)
            add_half = _add_half if problem.float_terms is None else _add_scaled_half
            for half in range(HALVES):
                total = add_half(problem, expansion, total, my_words, my_terms, load, lane, half)
        return total

    if tiling.workers == tiling.warps:
        return add_stages()
    return ptx.update_if(ptx.less(index, tiling.workers), sums, add_stages)


def stage_of_part(array, part: Value, stage: Value, stages: int, nbytes: int) -> Pointer:
    """Where a stage of a part begins in an array [parts, stages, nbytes]."""
    return ptx.advance(ptx.pointer(array, SHARED), ptx.times(ptx.plus(ptx.times(part, stages), stage), nbytes))


def _token_loader(problem: FewTokensProblem, tokens: Pointer, lane: Value, stage: Value):
    """load(half, chunk): the operands of both steps of half a stage, of eight tokens; two words each."""
    # Lane 8 i + r points to segment i of half a stage of token r.
    row = ptx.plus(ptx.times(ptx.bits_of(lane, CHUNK - 1), problem.token_rows), stage)
    start, segment = ptx.advance(tokens, ptx.times(row, BYTES_PER_ROW)), ptx.shift_right(lane, 3)
    in_swizzle = ptx.bits_of(row, _ROWS_OF_SWIZZLE - 1)

    @functools.cache
    def of_half(half: int) -> Pointer:
        moved = ptx.flip_bits(ptx.plus(segment, 2 * HALF_STEPS * half), in_swizzle)
        return ptx.advance(start, ptx.times(moved, _SEGMENT))

    def load(half: int, chunk: int) -> list[Value]:
        # Eight rows further on the swizzle is the same.
        return ptx.load_matrices(ptx.advance(of_half(half), CHUNK * problem.token_rows * BYTES_PER_ROW * chunk))

    return load


def _add_half(problem, expansion: Expansion, sums: Sums, words, terms, load, lane: Value, half: int) -> Sums:
    fields = expansion.load_fields(words, lane, half)
    group_terms = [] if terms is None else expansion.load_terms(terms, lane, half)
    fragments = [expansion.fragments(fields[step], group_terms, step) for step in range(HALF_STEPS)]
    sums = list(sums)
    for chunk in range(problem.token_chunks):
        token_words = load(half, chunk)
        for step in range(HALF_STEPS):
            for block in range(2):
                start = 4 * (block * problem.token_chunks + chunk)
                sums[start : start + 4] = ptx.multiply_add_byte_tiles(
                    fragments[step][4 * block : 4 * block + 4],
                    token_words[2 * step : 2 * step + 2],
                    sums[start : start + 4],
                )
    return sums


def _add_scaled_half(problem, expansion: Expansion, sums: Sums, words, terms, load, lane: Value, half: int) -> Sums:
    """As `_add_half`, of float scales of groups: sums are float32."""
    scaling = FloatScaling(problem.float_terms, -problem.recovery.w_format.max_value / 2)
    fields = expansion.load_fields(words, lane, half)
    first, end = (i * problem.chunks // HALVES for i in (half, half + 1))
    chunks = range(first, max(first + 1, end))
    # Terms that take arithmetic are made when they are multiplied, and wide codes step by step: registers would spill.
    is_late = problem.float_terms in LATE_TERMS
    is_wide = is_late and expansion.bits > _MOST_KEPT_BITS
    at_once = max(1, len(chunks) // HALF_STEPS) if is_wide else len(chunks)
    sums = list(sums)
    for start in range(0, len(chunks), at_once):
        pieces = {number: chunk_pieces(number, len(chunks)) for number in range(start, start + at_once)}
        steps = {step for steps in pieces.values() for step, _, _ in steps}
        fragments = {step: expansion.fragments(fields[step], [], step) for step in sorted(steps)}
        for chunk in range(problem.token_chunks):
            if chunk or is_late:
                # Keeps the compiler from loading the tokens of all chunks at once, and from keeping terms.
                ptx.synchronize_warp()
            if not is_late:
                row_terms = [scaling.load_terms(terms, chunks[number], lane) for number in pieces]
            tokens = load(half, chunk)
            for number, own_pieces in pieces.items():
                if is_late and number > start:
                    ptx.synchronize_warp()
                own_terms = scaling.load_terms(terms, chunks[number], lane) if is_late else row_terms[number]
                own_tokens = [tokens[2 * step + first : 2 * step + last] for step, first, last in own_pieces]
                token_sums = scaling.token_sums(own_tokens)
                for block in range(2):
                    weights = [
                        fragments[step][4 * block + 2 * first : 4 * block + 2 * last]
                        for step, first, last in own_pieces
                    ]
                    at = 4 * (block * problem.token_chunks + chunk)
                    for i, product in enumerate(scaling.multiply(weights, own_tokens)):
                        own = own_terms[2 * block + i // 2]
                        sums[at + i] = scaling.add(sums[at + i], own, product, token_sums[i % 2])
    return sums


def hand_over(problem: FewTokensProblem, sums: Sums, chunk: int, target, warpgroup: Value) -> None:
    """Stores this warp's sums of one chunk of tokens: [workers, PART_ROWS, CHUNK] in shared memory."""
    lane, warp = lane_and_warp()
    index, _, _ = worker(problem, warpgroup, warp)
    # Row r is lane // 4, tokens are 2 (lane % 4) and the next: a lane's two numbers follow its neighbour's.
    offset = ptx.plus(ptx.times(index, 4 * PART_ROWS * CHUNK), ptx.times(lane, 8))
    first = ptx.advance(ptx.pointer(target, SHARED), offset)
    with ptx.when(ptx.less(index, problem.tiling.workers)):
        for block in range(2):
            start = 4 * (block * problem.token_chunks + chunk)
            for half in range(2):
                at = ptx.advance(first, 4 * CHUNK * (RUN * block + RUN // 2 * half))
                ptx.store(at, [_as_word(problem, number) for number in sums[start + 2 * half : start + 2 * half + 2]])


def add_up(problem: FewTokensProblem, sums, totals, space: int) -> None:
    """Adds up the sums of the warps that divide K.

    Args:
      problem: the static side.
      sums: of `problem.sums_dtype`, [workers, PART_ROWS, CHUNK] in shared memory.
      totals: likewise, [2, rows, CHUNK]: of either block the rows of all parts.
      space: GLOBAL or SHARED, where the totals are.
    """
    tiling, thread = problem.tiling, thread_index()
    per_part = PART_ROWS * CHUNK // 4  # four numbers at once
    count = tiling.parts * per_part
    source, target = ptx.pointer(sums, SHARED), ptx.pointer(totals, space)
    for first in range(0, count, WARPGROUP):
        index = ptx.plus(thread, first)
        with ptx.when(ptx.less(index, count)):
            mine = ptx.advance(source, ptx.times(index, 16))
            total = ptx.load(mine, 4)
            for split in range(1, tiling.splits):
                more = ptx.load(ptx.advance(mine, 16 * count * split), 4)
                total = _added(problem, total, more)
            block = ptx.bits_of(ptx.shift_right(index, (per_part // 2).bit_length() - 1), 1)
            in_block = ptx.plus(
                ptx.times(ptx.shift_right(index, per_part.bit_length() - 1), per_part // 2),
                ptx.bits_of(index, per_part // 2 - 1),
            )
            at = ptx.plus(ptx.times(block, tiling.rows * CHUNK // 4), in_block)
            ptx.store(ptx.advance(target, ptx.times(at, 16)), total)


def add_blocks(problem: FewTokensProblem, by_block: list, totals) -> None:
    """Adds up the totals of the blocks that divide K.

    Args:
      problem: the static side.
      by_block: of `problem.sums_dtype`, [2, rows, CHUNK] each, in global memory.
      totals: likewise, in shared memory.
    """
    thread, count = thread_index(), 2 * problem.tiling.rows * CHUNK // 4  # four numbers at once
    for first in range(0, count, WARPGROUP):
        offset = ptx.times(ptx.plus(thread, first), 16)
        total, *others = [ptx.load(ptx.advance(ptx.pointer(array, GLOBAL), offset), 4) for array in by_block]
        for other in others:
            total = _added(problem, total, other)
        ptx.store(ptx.advance(ptx.pointer(totals, SHARED), offset), total)


def _as_word(problem: FewTokensProblem, number: Value) -> Value:
    return number if problem.sums_dtype == "int32" else ptx.as_word(number)


def _added(problem: FewTokensProblem, a: list[Value], b: list[Value]) -> list[Value]:
    """Sums of words that hold numbers of `problem.sums_dtype`."""
    if problem.sums_dtype == "int32":
        return [ptx.plus(x, y) for x, y in zip(a, b, strict=True)]
    return [ptx.as_word(ptx.add(ptx.as_float(x), ptx.as_float(y))) for x, y in zip(a, b, strict=True)]


def load_columns(problem: FewTokensProblem, sources, unit: Value) -> list[Value]:
    """Loads terms of a unit's columns, which `store_columns` puts to shared memory once they have arrived.

    Beyond n and the unit they are those of other columns, of no use.

    Args:
      problem: the static side.
      sources: [n] each, in global memory.
      unit: index of the unit.
    """
    tiling, thread, words = problem.tiling, thread_index(), []
    for first in range(0, 2 * tiling.rows, WARPGROUP):
        index = ptx.plus(thread, first)
        block = ptx.divided(index, tiling.rows)
        row = ptx.plus(index, ptx.times(block, -tiling.rows))
        part = ptx.plus(ptx.times(unit, tiling.parts), ptx.shift_right(row, RUN.bit_length() - 1))
        column = ptx.plus(_term_column(problem, block, part), ptx.bits_of(row, RUN - 1))
        column = ptx.smaller(column, problem.n - 1)
        for source in sources:
            words += ptx.load(ptx.advance_far(ptx.pointer(source, GLOBAL), column, 4), 1)
    return words


def store_columns(words: list[Value], targets) -> None:
    """Stores what `load_columns` loaded: [2, rows] in shared memory, for either block its rows."""
    offset = ptx.times(thread_index(), 4)
    for i, word in enumerate(words):
        turn, which = divmod(i, len(targets))
        ptx.store(ptx.advance(ptx.advance(ptx.pointer(targets[which], SHARED), offset), 4 * WARPGROUP * turn), [word])


def gather_tokens(problem: FewTokensProblem, sources, targets) -> None:
    """Copies terms of the tokens, [m] or more, to shared memory, [width]; beyond m those of the last token."""
    thread = thread_index()
    token = ptx.smaller(thread, problem.m - 1)
    with ptx.when(ptx.less(thread, problem.width)):
        for source, target in zip(sources, targets, strict=True):
            number = ptx.load(ptx.advance_far(ptx.pointer(source, GLOBAL), token, 4), 1)
            ptx.store(ptx.advance(ptx.pointer(target, SHARED), ptx.times(thread, 4)), number)


def load_residual(problem: FewTokensProblem, residual, unit: Value, chunk: Value) -> list[Value]:
    """Loads what will be added to this lane's numbers of a chunk: four words for each array of `problem.finished`.

    All loads are under way at once, and none is conditional. Those of numbers that do not exist are of others.

    Args:
      problem: the static side.
      residual: [m, padded_half] in global memory, of the output's dtype.
      unit: index of the unit.
      chunk: index of the tokens.
    """
    lane, warp = lane_and_warp()
    size, words = problem.dtype.itemsize, []
    rows = []
    for token_of_pair in range(2):
        token = ptx.plus(ptx.plus(ptx.times(ptx.bits_of(lane, 3), 2), ptx.times(chunk, CHUNK)), token_of_pair)
        token = ptx.smaller(token, problem.m - 1)
        rows.append(ptx.advance_far(ptx.pointer(residual, GLOBAL), token, problem.padded_half * size))
    for group, block in problem.finished:
        run, _ = _run_of_warp(problem, warp, unit, block, group)
        first = ptx.plus(ptx.smaller(run, problem.padded_half - RUN), ptx.shift_right(lane, 2))
        for row in rows:
            for half in range(2):
                at = ptx.advance_far(row, ptx.plus(first, RUN // 2 * half), size)
                words.append(ptx.load(at, 1)[0] if size == 4 else ptx.load_half(at))
    return words


def store_finished(
    problem: FewTokensProblem,
    numbers: list[Value],
    out,
    added: list[Value] | None,
    unit: Value,
    block: int,
    group: int,
    chunk: int,
) -> None:
    """Stores finished numbers plus the residual: this lane's four of FINISH_ROWS rows by CHUNK tokens.

    Args:
      problem: the static side.
      numbers: float32, or int32; of rows r and r + 8 of the warp's, tokens 2 q and 2 q + 1.
      out: [m, halves * padded_half] in global memory.
      added: the words of `load_residual` for these rows, or None; added to numbers that are rounded to their dtype.
      unit: index of the unit.
      block: of the parts.
      group: index of the rows in the block, in units of FINISH_ROWS.
      chunk: index of the tokens.
    """
    lane, warp = lane_and_warp()
    run, exists = _run_of_warp(problem, warp, unit, block, group)
    first = ptx.plus(ptx.plus(run, ptx.shift_right(lane, 2)), block * problem.padded_half if problem.halves > 1 else 0)
    size, row_width = problem.dtype.itemsize, problem.halves * problem.padded_half
    for token_of_pair in range(2):
        token = ptx.plus(ptx.times(ptx.bits_of(lane, 3), 2), CHUNK * chunk + token_of_pair)
        with ptx.when(ptx.bits_of(exists, ptx.less(token, problem.m))):
            for half in range(2):
                row = ptx.advance_far(ptx.pointer(out, GLOBAL), token, row_width * size)
                at = ptx.advance_far(row, ptx.plus(first, RUN // 2 * half), size)
                number = numbers[2 * half + token_of_pair]
                if added is not None:
                    number = _plus_loaded(problem, number, added[2 * token_of_pair + half])
                _store_number(problem, at, number)


def _run_of_warp(problem: FewTokensProblem, warp: Value, unit: Value, block: int, group: int) -> tuple[Value, Value]:
    """The first column, within `half`, of the rows that a warp finishes; and whether they exist."""
    in_unit = ptx.plus(warp, FINISH_ROWS // RUN * group)
    part = ptx.plus(ptx.times(unit, problem.tiling.parts), in_unit)
    run = ptx.times(part, RUN) if problem.gated else _term_column(problem, block, part)
    return run, ptx.bits_of(ptx.less(in_unit, problem.tiling.parts), ptx.less(run, problem.padded_half))


def _plus_loaded(problem: FewTokensProblem, number: Value, word: Value) -> Value:
    """A number, rounded, plus the one that was loaded."""
    if problem.dtype.itemsize == 4:
        return ptx.add(number, ptx.as_float(word))
    kind = PTX_TYPES[problem.dtype.name]
    rounded, added = (ptx.expand(kind, word)[0] for word in (ptx.rounded(kind, number), word))
    return ptx.add(rounded, added)


def _store_number(problem: FewTokensProblem, at: Pointer, number: Value) -> None:
    if problem.dtype.name == "int32":
        ptx.store(at, [number])
    elif problem.dtype.itemsize == 4:
        ptx.store(at, [ptx.as_word(number)])
    else:
        ptx.store_half(at, ptx.rounded(PTX_TYPES[problem.dtype.name], number))


def _term_column(problem: FewTokensProblem, block: Value | int, part: Value) -> Value:
    """`FewTokensProblem.term_column`."""
    between_blocks = problem.half if problem.gated else PARTS * RUN
    first = block * between_blocks if isinstance(block, int) else ptx.times(block, between_blocks)
    if problem.gated:
        return ptx.plus(ptx.times(part, RUN), first)
    tile, in_tile = ptx.shift_right(part, PARTS.bit_length() - 1), ptx.bits_of(part, PARTS - 1)
    return ptx.plus(ptx.plus(ptx.times(tile, PARTS * PART_ROWS), ptx.times(in_tile, RUN)), first)

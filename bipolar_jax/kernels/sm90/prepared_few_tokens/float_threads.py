"""What single threads do with float tokens: weights become 16-bit floats in registers, and sums are float32.

As `threads.multiply_slot`, with instructions of 16-bit floats. A token's stage is two rows of 128 bytes, each half a
stage, in the order of `prepared_weights.token_order`.
"""

from __future__ import annotations

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import lane_and_warp
from bipolar_jax.kernels.sm90.core.ptx import SHARED, Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import CHUNK, FewTokensProblem
from bipolar_jax.kernels.sm90.prepared_few_tokens.threads import Sums, stage_of_part, worker
from bipolar_jax.kernels.sm90.prepared_weights.centred_floats import CentredExpansion, zeros
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import chunk_pieces
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing.fields import WORDS_PER_VECTOR

_SEGMENT = 16  # bytes: what a lane of ldmatrix points to
_SEGMENTS = 4  # of a step
_ROWS_OF_SWIZZLE = 8
_MOST_WHOLE = 4  # times eight tokens: of more, chunks are scaled by halves of steps, or ptxas spills


def multiply_slot(problem: FewTokensProblem, sums: Sums, words, terms, tokens, warpgroup: Value) -> Sums:
    """Adds this warp's stages of a slot; arguments as of `threads.multiply_slot`.

    Args:
      problem: the static side.
      sums: of this warp, float32.
      words, terms: as there.
      tokens: uint32 [tokens, token_rows, 32] in shared memory, swizzled.
      warpgroup: of the calling threads.
    """
    tiling, expansion = problem.tiling, problem.recovery.expansion(problem.chunks, problem.float_terms)
    add_half = _add_half if problem.float_terms is None else _add_scaled_half
    lane, warp = lane_and_warp()
    index, part, split = worker(problem, warpgroup, warp)

    def add_stages() -> Sums:
        total = list(sums)
        for turn in range(tiling.depth):
            stage = ptx.plus(split, tiling.splits * turn)
            my_words = stage_of_part(words, part, stage, tiling.stages, 4 * problem.w_bits * WORDS_PER_VECTOR)
            my_terms = None
            if terms is not None:
                my_terms = stage_of_part(terms, part, stage, problem.term_stages, 4 * problem.term_words)
            for half in range(HALVES):
                own = _token_addresses(problem, ptx.pointer(tokens, SHARED), lane, stage, half)
                total = add_half(problem, expansion, total, my_words, my_terms, own, lane, half)
        return total

    if tiling.workers == tiling.warps:
        return add_stages()
    return ptx.update_if(ptx.less(index, tiling.workers), sums, add_stages)


def _token_addresses(problem: FewTokensProblem, tokens: Pointer, lane: Value, stage: Value, half: int) -> list[Pointer]:
    """What this lane points to for either step of half a stage, of the first eight tokens."""
    # Lane 8 i + r points to segment i of the step of token r.
    row = ptx.plus(ptx.times(ptx.bits_of(lane, CHUNK - 1), problem.token_rows), ptx.plus(ptx.times(stage, 2), half))
    start, segment = ptx.advance(tokens, ptx.times(row, BYTES_PER_ROW)), ptx.shift_right(lane, 3)
    in_swizzle = ptx.bits_of(row, _ROWS_OF_SWIZZLE - 1)
    segments = [ptx.flip_bits(ptx.plus(segment, _SEGMENTS * step), in_swizzle) for step in range(HALF_STEPS)]
    return [ptx.advance(start, ptx.times(segment, _SEGMENT)) for segment in segments]


def _add_half(
    problem: FewTokensProblem,
    expansion: FloatExpansion,
    sums: Sums,
    words: Pointer,
    terms: Pointer | None,
    tokens: list[Pointer],
    lane: Value,
    half: int,
) -> Sums:
    fields = expansion.fields.load_fields(words, lane, half)
    group_terms = expansion.load_terms(terms, lane, half)
    sums = list(sums)
    for step in range(HALF_STEPS):
        registers = expansion.fragments(fields[step], group_terms, step)
        for chunk in range(problem.token_chunks):
            token_words = _load_tokens(problem, tokens[step], chunk)
            for block in range(2):
                start = 4 * (block * problem.token_chunks + chunk)
                own = registers[4 * block : 4 * block + 4]
                sums[start : start + 4] = expansion.multiply_step(own, token_words, sums[start : start + 4])
    return sums


def _add_scaled_half(
    problem: FewTokensProblem,
    expansion: CentredExpansion,
    sums: Sums,
    words: Pointer,
    terms: Pointer,
    tokens: list[Pointer],
    lane: Value,
    half: int,
) -> Sums:
    """As `_add_half`, of float scales of groups: sums of each chunk are scaled."""
    fields, sums = expansion.fields.load_fields(words, lane, half), list(sums)
    first_chunk, end = (i * problem.chunks // HALVES for i in (half, half + 1))
    chunks = range(first_chunk, max(first_chunk + 1, end))
    count = 2 * HALF_STEPS if problem.token_chunks > _MOST_WHOLE else len(chunks)
    for index in range(count):
        chunk, pieces = chunks[index * len(chunks) // count], chunk_pieces(index, count)
        registers = [expansion.centred(fields[step], step) for step, _, _ in pieces]
        row_terms = expansion.load_chunk_terms(terms, chunk, lane)
        for token_chunk in range(problem.token_chunks):
            # Keeps the compiler from loading the tokens of all chunks at once.
            ptx.synchronize_warp()
            own_tokens = [
                _load_tokens(problem, tokens[step], token_chunk)[2 * first : 2 * last] for step, first, last in pieces
            ]
            token_sums = zeros(4)
            for own in own_tokens:
                token_sums = expansion.token_sums(own, token_sums)
            for block in range(2):
                products = zeros(4)
                for own, of_step, (_, first, last) in zip(own_tokens, registers, pieces, strict=True):
                    weights = of_step[4 * block + 2 * first : 4 * block + 2 * last]
                    products = expansion.multiply_step(weights, own, products)
                start = 4 * (block * problem.token_chunks + token_chunk)
                for i, product in enumerate(products):
                    own_terms = row_terms[2 * block + i // 2]
                    sums[start + i] = expansion.scaling.add(sums[start + i], own_terms, product, token_sums[i % 2])
    return sums


def _load_tokens(problem: FewTokensProblem, tokens: Pointer, chunk: int) -> list[Value]:
    """The operands of a step of eight tokens: two words for either half."""
    # Eight rows further on the swizzle is the same.
    return ptx.load_matrices(ptx.advance(tokens, CHUNK * problem.token_rows * BYTES_PER_ROW * chunk))

"""What single threads do with float tokens: weights become 16-bit floats in registers, and sums are float32.

As `threads.multiply_slot`, with instructions of 16-bit floats. A token's stage is two rows of 128 bytes, each half a
stage, in the order of `prepared_weights.float_tokens`.
"""

from __future__ import annotations

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import lane_and_warp
from bipolar_jax.kernels.sm90.core.ptx import SHARED, Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import CHUNK, FewTokensProblem
from bipolar_jax.kernels.sm90.prepared_few_tokens.threads import Sums, stage_of_part, worker
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing.fields import CHUNK_WORDS, WORDS_PER_VECTOR

_SEGMENT = 16  # bytes: what a lane of ldmatrix points to
_SEGMENTS = 4  # of a step
_ROWS_OF_SWIZZLE = 8


def multiply_slot(problem: FewTokensProblem, sums: Sums, words, terms, tokens, warpgroup: Value) -> Sums:
    """Adds this warp's stages of a slot; arguments as of `threads.multiply_slot`.

    Args:
      problem: the static side.
      sums: of this warp, float32.
      words, terms: as there.
      tokens: uint32 [tokens, token_rows, 32] in shared memory, swizzled.
      warpgroup: of the calling threads.
    """
    tiling, expansion = problem.tiling, problem.recovery.expansion(problem.chunks)
    lane, warp = lane_and_warp()
    index, part, split = worker(problem, warpgroup, warp)

    def add_stages() -> Sums:
        total = list(sums)
        for turn in range(tiling.depth):
            stage = ptx.plus(split, tiling.splits * turn)
            my_words = stage_of_part(words, part, stage, tiling.stages, 4 * problem.w_bits * WORDS_PER_VECTOR)
            my_terms = None
            if terms is not None:
                my_terms = stage_of_part(terms, part, stage, problem.term_stages, 4 * problem.chunks * CHUNK_WORDS)
            for half in range(HALVES):
                own = _token_addresses(problem, ptx.pointer(tokens, SHARED), lane, stage, half)
                total = _add_half(problem, expansion, total, my_words, my_terms, own, lane, half)
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
            # Eight rows further on the swizzle is the same.
            at = ptx.advance(tokens[step], CHUNK * problem.token_rows * BYTES_PER_ROW * chunk)
            token_words = ptx.load_matrices(at)
            for block in range(2):
                start = 4 * (block * problem.token_chunks + chunk)
                own = registers[4 * block : 4 * block + 4]
                sums[start : start + 4] = expansion.multiply_step(own, token_words, sums[start : start + 4])
    return sums

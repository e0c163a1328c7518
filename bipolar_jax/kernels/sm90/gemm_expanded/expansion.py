"""What threads do with prepared weights: load fields, expand them to bytes, and multiply them from registers.

With groups a register of four codes becomes four weights by one multiply-add, word * s + 0x01010101 * (o + 128): no
byte carries into the next, because s * u + o + 128 is from 0 to 255. Without groups the codes are the bytes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragment_wgmma import multiply_fragments, wait
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.gemm_expanded.layout import (
    CHUNK_WORDS,
    REGISTERS,
    STAGE,
    STEPS,
    TILE_ROWS,
    VECTOR,
    WORDS_PER_VECTOR,
    expanded_in_jnp,
    fields_of,
)

HALVES = 2  # of a stage; a field of one bit has two words in each
_HALF_STEPS = STEPS // HALVES
_EVERY_BYTE = 0x01010101


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How fields become bytes.

    Attributes:
      bits: of the codes.
      chunks: chunks of a stage with terms of their own; 0 without groups.
    """

    bits: int
    chunks: int

    def load_fields(self, words: Value, half: int) -> list[list[list[Value]]]:
        """A thread's words of half a stage: of every field, for each of its steps.

        Args:
          words: uint32 [4 * bits, 128] in shared memory, one tile and stage.
          half: which half of the stage.
        """
        thread = ptx.times(ptx.thread_in_warpgroup(), 4 * VECTOR)
        mine = ptx.advance(ptx.pointer(words, ptx.SHARED), thread)
        fields, first = [], 0
        for width, _ in fields_of(self.bits):
            start, count = _HALF_STEPS * half * width, _HALF_STEPS * width
            at_once = min(VECTOR, count)
            loaded = []
            for index in range(start, start + count, at_once):
                vector, slot = first + index // VECTOR, index % VECTOR
                loaded += ptx.load(ptx.advance(mine, 4 * (vector * WORDS_PER_VECTOR + slot)), at_once)
            fields.append([loaded[step * width : (step + 1) * width] for step in range(_HALF_STEPS)])
            first += width
        return fields

    def load_terms(self, terms: Value, half: int) -> list[list[tuple[Value, Value]]]:
        """(s, o + 128 in every byte) of a thread's four rows, for each chunk of half a stage, or the one around it.

        Args:
          terms: uint32 [chunks, CHUNK_WORDS] in shared memory.
          half: which half of the stage.
        """
        # Lane 4 r + t of warp w: the words 2 (8 w + r), of block 0, and the next, of block 1.
        rows = ptx.shift_right(ptx.thread_in_warpgroup(), 2)
        mine = ptx.advance(ptx.pointer(terms, ptx.SHARED), ptx.times(rows, 8))
        first = half * self.chunks // HALVES
        chunks = []
        for chunk in range(first, max(first + 1, (half + 1) * self.chunks // HALVES)):
            pairs = ptx.load(ptx.advance(mine, 4 * CHUNK_WORDS * chunk), 2)
            chunks.append(
                [
                    (
                        ptx.pick_bytes(pair, ptx.int32(0), 0x4440 + 2 * row),
                        ptx.pick_bytes(pair, ptx.int32(0), 0x1111 * (2 * row + 1)),
                    )
                    for pair in pairs
                    for row in range(2)
                ]
            )
        return chunks

    def fragments(self, fields: list[list[Value]], terms: list[list[tuple[Value, Value]]], step: int) -> list[Value]:
        """The registers of A for one step: four of the first 64 rows, four of the others.

        Args:
          fields: of every field, the thread's words of this step.
          terms: of `load_terms`, of the half that the step is in; empty without groups.
          step: which step of the half.
        """
        registers = []
        for register in range(REGISTERS):
            codes = self._codes(fields, register)
            if terms:
                block, half, row = register // 4, register // 2 % 2, register % 2
                scale, offset = terms[(2 * step + half) * len(terms) // (2 * _HALF_STEPS)][2 * block + row]
                codes = ptx.plus(ptx.times(codes, scale), offset)
            registers.append(codes)
        return registers

    def _codes(self, fields: list[list[Value]], register: int) -> Value:
        codes = None
        for (width, shift), words in zip(fields_of(self.bits), fields, strict=True):
            word = words[register * width // 8]
            if width == 8:
                return word
            position = width * (register % (8 // width))
            moved = (
                ptx.shift_right(word, position - shift) if position >= shift else ptx.shift_left(word, shift - position)
            )
            field = ptx.bits_of(moved, ((1 << width) - 1 << shift) * _EVERY_BYTE)
            codes = field if codes is None else ptx.either_bits(codes, field)
        return codes


def _multiply_half_twin(acc, tokens, words, terms, expansion, half):
    elements = STAGE // HALVES
    expanded = expanded_in_jnp(
        words[...].reshape(expansion.bits, WORDS_PER_VECTOR), None if terms is None else terms[...]
    )
    token_bytes = lax.bitcast_convert_type(tokens[...], jnp.int8).reshape(-1, STAGE)
    # The hardware reads tokens through the async proxy. The race detector sees ordinary reads here, which must be
    # ordered before the next TMA write.
    plgpu.commit_smem()
    w, x = (
        lax.dynamic_slice_in_dim(side, half * elements, elements, axis=1).astype(jnp.float32)
        for side in (expanded, token_bytes)
    )
    # At most 64 * 255 * 128: exact in float32.
    return acc + lax.dot_general(w, x, (((1,), (1,)), ((), ()))).astype(jnp.int32)


@with_twin(_multiply_half_twin)
def multiply_half(
    acc: Int[Array, "rows tokens"], tokens, words, terms, expansion: Expansion, half: int
) -> Int[Array, "rows tokens"]:
    """Starts acc += weights . tokens^T over half a stage, one commit group for each step of 32 elements.

    When it returns, at most the last group is in flight; all that came before have ended. Before `wgmma.settle` the
    result must not be read, nor the tokens overwritten.

    Args:
      acc: [TILE_ROWS, tokens] in the layout `wgmma.ACCUMULATOR`.
      tokens: ref in shared memory, uint32 [tokens, 32] with `wgmma.TILE_TRANSFORMS`.
      words: likewise, uint32 [4 * bits, 128], one tile and stage of prepared weights.
      terms: likewise, uint32 [chunks, CHUNK_WORDS], or None.
      expansion: how fields become bytes.
      half: which half of the stage.
    """
    refs = [words] if terms is None else [words, terms]

    @plgpu.inline_mgpu(
        arg_types=(wgmma.ACCUMULATOR, plgpu.RefType(wgmma.TILE_TRANSFORMS), *[plgpu.RefType()] * len(refs)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.int32, layout=wgmma.ACCUMULATOR),
    )
    def inline(_, acc, tokens, words, *terms):
        fields = expansion.load_fields(words, half)
        group_terms = expansion.load_terms(terms[0], half) if terms else []
        for step in range(_HALF_STEPS):
            fragments = expansion.fragments([words[step] for words in fields], group_terms, step)
            acc = multiply_fragments(acc, fragments, tokens, _HALF_STEPS * half + step)
            # Its registers may be overwritten once the next group is in flight.
            wait(in_flight=1)
        return acc

    return inline(acc, tokens, *refs)


def zeros(tokens: int) -> jax.Array:
    """An accumulator to begin with."""
    return wgmma.begin(wgmma.zeros(TILE_ROWS, tokens))

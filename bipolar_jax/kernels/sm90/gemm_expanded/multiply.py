"""Half a stage of a consumer's product: weights from fields to registers to the tensor cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Num

from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragment_wgmma import multiply_fragments, wait
from bipolar_jax.kernels.sm90.core.fragments import lane_and_warp
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion
from bipolar_jax.packing.fields import CHUNK_WORDS, STAGE, TILE_ROWS, WORDS_PER_VECTOR, expand_tile


class Multiplication(Protocol):
    """What the tensor cores multiply; static.

    Attributes:
      kind: of the tokens, and of what weights become.
      bits: of the weights' codes.
      term_words: words of the groups' terms of a stage and part.
    """

    kind: OperandKind
    bits: int
    term_words: int

    def fragments(self, words: Pointer, terms: Pointer | None, lane: Value, half: int) -> Iterator[list[Value]]:
        """A's registers of every 32 bytes of the tokens' half stage: four of block 0, four of block 1.

        Args:
          words, terms: of the thread's part and the whole stage, in shared memory.
          lane: of the thread in its warp.
          half: which half of the stage.
        """

    def first_step(self, half: int) -> int:
        """Which 32 bytes of a row of the tokens' tile a half stage begins with."""

    def operands(self, words: Array, terms: Array | None, tokens: Array, half: int) -> tuple[Array, Array]:
        """Weights [TILE_ROWS, STAGE / 2] and tokens of half a stage as float32, in jnp."""


@dataclasses.dataclass(frozen=True)
class ByteMultiplication:
    """Unsigned bytes of weights times signed bytes of tokens; a tile of tokens is a stage."""

    expansion: Expansion
    kind: ClassVar[OperandKind] = "int8"

    @property
    def bits(self) -> int:
        return self.expansion.bits

    @property
    def term_words(self) -> int:
        return self.expansion.chunks * CHUNK_WORDS

    def fragments(self, words: Pointer, terms: Pointer | None, lane: Value, half: int) -> Iterator[list[Value]]:
        fields = self.expansion.load_fields(words, lane, half)
        group_terms = [] if terms is None else self.expansion.load_terms(terms, lane, half)
        for step in range(HALF_STEPS):
            yield self.expansion.fragments(fields[step], group_terms, step)

    def first_step(self, half: int) -> int:
        return HALF_STEPS * half

    def operands(self, words: Array, terms: Array | None, tokens: Array, half: int) -> tuple[Array, Array]:
        weights = expand_tile(words, terms).astype(jnp.float32)
        token_bytes = lax.bitcast_convert_type(tokens, jnp.int8).reshape(-1, STAGE).astype(jnp.float32)
        return of_half(weights, half), of_half(token_bytes, half)


def of_half(stage: Num[Array, "rows stage"], half: int) -> Num[Array, "rows half"]:
    """The columns of half a stage."""
    return lax.dynamic_slice_in_dim(stage, half * (STAGE // HALVES), STAGE // HALVES, axis=1)


def _multiply_half_twin(acc, tokens, words, terms, multiplication, half):
    w, x = multiplication.operands(words[...], None if terms is None else terms[...], tokens[...], half)
    # The hardware reads tokens through the async proxy. The race detector sees ordinary reads here, which must be
    # ordered before the next TMA write.
    plgpu.commit_smem()
    # Of bytes at most 64 * 255 * 128: exact in float32.
    product = lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    return acc + product.astype(acc.dtype)


@with_twin(_multiply_half_twin)
def multiply_half(
    acc: Num[Array, "rows tokens"], tokens, words, terms, multiplication: Multiplication, half: int
) -> Num[Array, "rows tokens"]:
    """Starts acc += weights . tokens^T over half a stage, one commit group for every 32 bytes of the tokens' rows.

    When it returns, at most its own groups are in flight; all that came before have ended. Before `wgmma.settle` the
    result must not be read, nor the tokens overwritten.

    Args:
      acc: [TILE_ROWS, tokens] of `wgmma.accumulator_dtype` in the layout `wgmma.ACCUMULATOR`.
      tokens: ref in shared memory, [tokens, 32 words or 64 floats] with `wgmma.TILE_TRANSFORMS`: the tile of this half.
      words: likewise, uint32 [PARTS, bits, WORDS_PER_VECTOR], one tile and stage of prepared weights.
      terms: likewise, uint32 [PARTS, vectors, words], or None.
      multiplication: what fields become.
      half: which half of the stage.
    """
    refs = [words] if terms is None else [words, terms]

    @plgpu.inline_mgpu(
        arg_types=(wgmma.ACCUMULATOR, plgpu.RefType(wgmma.TILE_TRANSFORMS), *[plgpu.RefType()] * len(refs)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=wgmma.ACCUMULATOR),
    )
    def inline(_, acc, tokens, words, terms=None):
        lane, warp = lane_and_warp()

        def part(ref, part_words: int):
            return ptx.advance(ptx.pointer(ref, ptx.SHARED), ptx.times(warp, 4 * part_words))

        own_words = part(words, multiplication.bits * WORDS_PER_VECTOR)
        own_terms = None if terms is None else part(terms, multiplication.term_words)
        first = multiplication.first_step(half)
        for step, fragments in enumerate(multiplication.fragments(own_words, own_terms, lane, half), first):
            acc = multiply_fragments(acc, fragments, tokens, step, multiplication.kind)
            # ptxas keeps registers of groups in flight apart: two leave time to expand the next.
            wait(in_flight=2)
        return acc

    return inline(acc, tokens, *refs)


def zeros(tokens: int, kind: OperandKind) -> jax.Array:
    """An accumulator to begin with."""
    return wgmma.begin(wgmma.zeros(TILE_ROWS, tokens, kind))

"""Half a stage of a consumer's product: weights from fields to registers to the tensor cores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragment_wgmma import multiply_fragments, wait
from bipolar_jax.kernels.sm90.core.fragments import lane_and_warp
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion
from bipolar_jax.packing.fields import CHUNK_WORDS, STAGE, TILE_ROWS, WORDS_PER_VECTOR, expand_tile


def _multiply_half_twin(acc, tokens, words, terms, expansion, half):
    elements = STAGE // HALVES
    expanded = expand_tile(words[...], None if terms is None else terms[...])
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

    When it returns, at most its own groups are in flight; all that came before have ended. Before `wgmma.settle` the
    result must not be read, nor the tokens overwritten.

    Args:
      acc: [TILE_ROWS, tokens] in the layout `wgmma.ACCUMULATOR`.
      tokens: ref in shared memory, uint32 [tokens, 32] with `wgmma.TILE_TRANSFORMS`.
      words: likewise, uint32 [PARTS, bits, WORDS_PER_VECTOR], one tile and stage of prepared weights.
      terms: likewise, uint32 [PARTS, chunks, CHUNK_WORDS], or None.
      expansion: how fields become bytes.
      half: which half of the stage.
    """
    refs = [words] if terms is None else [words, terms]

    @plgpu.inline_mgpu(
        arg_types=(wgmma.ACCUMULATOR, plgpu.RefType(wgmma.TILE_TRANSFORMS), *[plgpu.RefType()] * len(refs)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.int32, layout=wgmma.ACCUMULATOR),
    )
    def inline(_, acc, tokens, words, *terms):
        lane, warp = lane_and_warp()

        def part(ref, part_words: int):
            return ptx.advance(ptx.pointer(ref, ptx.SHARED), ptx.times(warp, 4 * part_words))

        fields = expansion.load_fields(part(words, expansion.bits * WORDS_PER_VECTOR), lane, half)
        group_terms = [
            chunk
            for ref in terms
            for chunk in expansion.load_terms(part(ref, expansion.chunks * CHUNK_WORDS), lane, half)
        ]
        for step in range(HALF_STEPS):
            fragments = expansion.fragments(fields[step], group_terms, step)
            acc = multiply_fragments(acc, fragments, tokens, HALF_STEPS * half + step)
            # Four steps have registers of their own: two groups in flight leave time to expand the next.
            wait(in_flight=2)
        return acc

    return inline(acc, tokens, *refs)


def zeros(tokens: int) -> jax.Array:
    """An accumulator to begin with."""
    return wgmma.begin(wgmma.zeros(TILE_ROWS, tokens))

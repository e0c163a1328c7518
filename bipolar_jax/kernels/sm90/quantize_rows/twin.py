"""The twin in jnp of the row quantizer's device function, for interpret mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, UInt32

from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up, join_fields, pack_planes
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.quantize_rows.quantizer import RowQuantizer
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK


def quantize_slot_twin(
    quantizer: RowQuantizer, first_row: Int[Array, ""], x, scratch, words, scale, zero_code, code_sums, *vectors
) -> None:
    """`RowQuantizer.quantize` on refs."""
    a_format, k = quantizer.code_words.a_format, quantizer.k
    parts = 1 if quantizer.prologue is None else quantizer.prologue.parts
    filled = quantizer.blocks * BLOCK
    numbers = x[...][:, : parts * filled].reshape(quantizer.rows, parts, filled)[..., :k]
    prologue = jax.tree.unflatten(jax.tree.structure(quantizer.prologue), [vector[...][:k] for vector in vectors])
    tokens = quantize_tokens(numbers.reshape(quantizer.rows, -1), a_format, prologue)
    if quantizer.code_words.signed:
        packed = _pack_bytes(a_format.signed_codes(tokens.codes))
    else:
        packed = pack_planes(tokens.codes, a_format)
    packed = fill_up(packed, quantizer.row_words)
    zero_codes = tokens.zero_value if a_format.bits == 1 else (tokens.zero_value + a_format.max_value) // 2
    sums = jnp.sum(tokens.codes, axis=1, dtype=jnp.int32)
    for i in range(quantizer.rows):

        @when(first_row + i < quantizer.m)
        def _(i=i):
            words[:, first_row + i] = packed[:, i]
            scale[first_row + i] = tokens.scale[i]
            zero_code[first_row + i] = zero_codes[i]
            code_sums[first_row + i] = sums[i]

    plgpu.commit_smem()  # TMA may overwrite the slot from here on


def _pack_bytes(signed_codes: Int[Array, "m k"]) -> UInt32[Array, "1 m words"]:
    in_bytes = fill_up(signed_codes.astype(jnp.uint8), BLOCK)
    by_word = jnp.swapaxes(in_bytes.reshape(1, in_bytes.shape[0], -1, 4, 8), 3, 4)
    return join_fields(by_word, 8).reshape(1, in_bytes.shape[0], -1)

"""The definition of the products: pure jnp over bit planes, written to be read and compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarArray, BipolarNumbers, UnpackedArray
from bipolar_jax.packing.bipolar_array import code_sums
from bipolar_jax.packing.words import WORD_BITS, num_words, pack_codes
from bipolar_jax.quantize.groups import group_lengths, num_groups


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    """Exact integer products by AND and popcount, as binary tensor cores compute them.

    Codes are sums over bits, u_a = sum_i p_i a_i and u_w = sum_j q_j b_j; values are v_a = 2 u_a - A and
    v_w = 2 u_w - W, with A and W the largest values. For a group of true length L

        sum v_a v_w = 4 sum u_a u_w - 2 W sum u_a - 2 A sum u_w + L A W,
        sum u_a u_w = sum_ij p_i q_j popcount(a_i & b_j).

    Integer groups have v_w = s u_w + o, and one sum over all groups,

        sum_g s (2 sum u_a u_w - A sum u_w) + o (2 sum u_a - L A).

    Terms may wrap around in int32. The sum is exact nevertheless: it fits int32 (`BipolarFormat.max_contraction`), and
    wrap-around is arithmetic modulo 2^32.
    """
    if isinstance(w, UnpackedArray):
        raise Unsupported("it multiplies bit planes, and the weights are unpacked")
    return _integer_matmul(codes, w.with_scales(), a_format)


def _integer_matmul(codes: Array, w: BipolarNumbers, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    a_planes = pack_codes(codes, a_format)
    w_planes = w.planes if isinstance(w, BipolarArray) else pack_codes(w.codes(), w.format)
    masks = _group_masks(w.contracted_size, w.group_size)
    products = jnp.int32(0)
    for i, p in enumerate(a_format.plane_weights):
        for j, q in enumerate(w.format.plane_weights):
            products = products + p * q * _and_popcount(a_planes[i], w_planes[j], masks)
    a_sums = code_sums(codes, w.group_size)
    a_max, w_max = a_format.max_value, w.format.max_value
    lengths = group_lengths(w.contracted_size, w.group_size)
    if w.groups is not None:
        s, o = (terms.astype(jnp.int32)[None] for terms in (w.groups.scale, w.groups.offset))
        w_sums = code_sums(w.codes(), w.group_size)
        a_value_sums = (2 * a_sums - a_max * lengths[None])[:, None]
        sums = s * (2 * products - a_max * w_sums[None]) + o * a_value_sums
        return jnp.sum(sums, axis=-1, keepdims=True, dtype=jnp.int32)
    return (
        4 * products
        - 2 * w_max * a_sums[:, None]
        - 2 * a_max * w.row_sums[None]
        + lengths[None, None] * (a_max * w_max)
    )


def quantized_matmul(
    x: Float[Array, "m columns"],
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None = None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.quantized_matmul`."""
    if isinstance(w, UnpackedArray):
        raise Unsupported("it multiplies bit planes, and the weights are unpacked")
    w = w.with_scales()
    rows, row_factor = epilogue.reduced_rows(x.astype(jnp.float32) if prologue is None else prologue(x))
    tokens = quantize_tokens(rows, a_format)
    exponents = epilogue.column_exponents(w.scale, w.offset)
    scale, offset = (None if a is None else epilogue.without_exponent(a, exponents) for a in (w.scale, w.offset))
    integers = _integer_matmul(tokens.codes, w, a_format)
    lengths = group_lengths(w.contracted_size, w.scale_group_size)
    x_sums = epilogue.value_sums(code_sums(tokens.codes, w.scale_group_size), a_format, lengths)
    w_sums = w.value_sums()
    total = jnp.zeros(integers.shape[:2], jnp.float32)
    for g in range(integers.shape[2]):
        total += epilogue.scale_group(integers[:, :, g], tokens.zero_value, w_sums[:, g], scale[:, g])
        if offset is not None:
            total += epilogue.offset_group(x_sums[:, g], tokens.zero_value, int(lengths[g]), offset[:, g])
    return epilogue.finish(total, tokens.scale, bias, x.dtype, residual, activation, exponents, row_factor)


def weight_only_matmul(
    x: Float[Array, "m k"],
    w: BipolarArray,
    bias: Float[Array, " n"] | None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.weight_only_matmul`."""
    total = jnp.matmul(x.astype(jnp.float32), w.dequantize(), precision=jax.lax.Precision.HIGHEST)
    return epilogue.activate_and_add(epilogue.finish(total, None, bias, x.dtype), activation, x.dtype, residual)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
    """See `Backend.plan_matmul`."""
    if a_format is None:
        return Plan("float32 matmul of dequantized weights", "the definition, to compare with")
    return Plan(f"AND-popcount of {a_format.bits} x {w.bits} planes in jnp", "the definition, to compare with")


def _and_popcount(
    a: UInt32[Array, "m words"], b: UInt32[Array, "n words"], masks: UInt32[np.ndarray, "groups words"]
) -> Int[Array, "m n groups"]:
    both = a[:, None, None, :] & b[None, :, None, :] & masks[None, None]
    return jnp.sum(jax.lax.population_count(both).astype(jnp.int32), axis=-1, dtype=jnp.int32)


def _group_masks(k: int, group_size: int | None) -> UInt32[np.ndarray, "groups words"]:
    """For each group, masks of the bits that belong to it; groups need not end on a word boundary."""
    groups = num_groups(k, group_size)
    bits = np.arange(num_words(k) * WORD_BITS)
    member = (bits // (group_size or k) == np.arange(groups)[:, None]) & (bits < k)
    return np.packbits(member, axis=-1, bitorder="little").view("<u4")

"""What attends to what: whole prompts causally, and one new token of each sequence to its cache."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels import sm90
from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.alibi import alibi_bias, alibi_slopes
from bipolar_jax.models.blocks.rope import Tables, rotate
from bipolar_jax.models.kv_cache.cache import Kept, KVCache, row_major
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads

# Positions whose values are summed by themselves, and their sums after: one sum over all has too few columns to fill a
# GPU, and XLA, which knows, rather writes all products to memory. Compiled for the H200, 32 and 128 gave it no less.
_RUN = 64

Heads = Float[Array, "batch length heads head_dim"]
# Queries, keys and values, or one array of them all, side by side in this order.
Projected = tuple[Heads, Heads, Heads] | tuple[Heads]


def causal_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    bias: Float[Array, "#batch #heads #length length"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Every position attends to itself and to all before it, through cuDNN's flash attention where that can serve.

    Args:
      q: queries; consecutive ones share a key head.
      k: keys.
      v: values.
      bias: added to the scores after their scaling, such as ALiBi's; axes of 1 are repeated.
    """
    implementation = causal_implementation(default_device(), q, bias)
    if bias is not None and implementation == "cudnn":
        bias = whole_bias(bias).astype(q.dtype)  # nothing is left to do if `prompts_alibi` made it
    return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=True, implementation=implementation)


def prompts_alibi(q: Any) -> Float[Array, "1 heads #length length"]:
    """ALiBi's biases as `causal_attention` hands them on: for cuDNN of every query and key, else one row.

    They are to be made before a loop over layers: cuDNN's heads * length^2 numbers, made in its body, are made anew
    in every turn.

    Args:
      q: queries or their shape and dtype, [batch, length, heads, head_dim].
    """
    _, length, heads, _ = q.shape
    row = alibi_bias(heads, length)
    if causal_implementation(default_device(), q, row) != "cudnn":
        return row
    # What is made of a constant XLA moves into the loop again.
    return whole_bias(jax.lax.optimization_barrier(row)).astype(q.dtype)


def causal_implementation(device: jax.Device, q: Any, bias: Any | None) -> Literal["cudnn", "xla"]:
    """The implementation of `jax.nn.dot_product_attention` that serves these queries on this device.

    cuDNN's takes bfloat16 and float16 on NVIDIA GPUs from compute capability 8.0 on, heads of at most 128 numbers
    (256 from 9.0 on) and a multiple of 8, and, because of the gradient, a bias only for an even number of positions.

    Args:
      device: where it will run.
      q: array or its shape and dtype, [batch, length, heads, head_dim].
      bias: likewise, [batch or 1, heads or 1, length or 1, length], or None.
    """
    # AMD's GPUs, of the same platform, have names such as gfx90a there.
    capability = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability is None:
        return "xla"
    capability = (int(capability[1]), int(capability[2]))
    _, length, _, head_dim = q.shape
    serves = (
        capability >= (8, 0)
        and jnp.dtype(q.dtype) in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= (256 if capability >= (9, 0) else 128)
        and (bias is None or (length % 2 == 0 and bias.shape[3] == length))
    )
    return "cudnn" if serves else "xla"


def whole_bias(bias: Float[Array, "batch heads #length length"]) -> Float[Array, "batch heads length length"]:
    """A bias of which each query has a row of its own, as cuDNN wants it.

    One row for all is shifted to 0 where a query meets its own position. Softmax ignores what is the same for all keys
    of a query, and ALiBi's slope * key, large where the text is long, would not survive bfloat16: its distances do.
    """
    return bias if bias.shape[2] == bias.shape[3] else bias - jnp.swapaxes(bias, 2, 3)


def rotated_heads(projected: Projected, kv_heads: int, tables: Tables | None) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values, the first two rotated if there are tables."""
    if len(projected) == 3:
        q, k, v = projected
    else:
        (whole,) = projected
        heads = whole.shape[2] - 2 * kv_heads
        q, k, v = jnp.split(whole, (heads, heads + kv_heads), axis=2)
    return (q, k, v) if tables is None else (rotate(q, tables), rotate(k, tables), v)


def attend_to_cache(
    projected: Projected,
    cache: KVCache,
    layer: Int[Array, ""],
    tables: Tables | None = None,
    *,
    alibi: bool = False,
) -> tuple[Float[Array, "batch 1 heads head_dim"], KVCache]:
    """One token of each sequence enters the cache and attends to it: a kernel of its own on Hopper GPUs, else XLA's.

    Both give the same numbers but for rounding. A sequence that fills the cache attends to what is in there.

    Args:
      projected: of the token, [batch, 1, heads, head_dim] each; consecutive queries share a key head.
      cache: `lengths` are the token's positions.
      layer: the cache's layer to write and to read.
      tables: cosines and sines that q and k are rotated by first, see `rope.rope_tables`.
      alibi: whether to add ALiBi's biases to the scores.

    Returns:
      What the queries get, and the cache with the token written and not yet counted.
    """
    try:
        return _attend_on_sm90(projected, cache, layer, tables, alibi)
    except Unsupported:
        return _attend_on_xla(projected, cache, layer, tables, alibi)


def _attend_on_sm90(projected: Projected, cache: KVCache, layer, tables, alibi: bool):
    (keys, values), trees = zip(*map(jax.tree.flatten, (cache.keys, cache.values)), strict=True)
    heads = sum(x.shape[2] for x in projected) - 2 * keys[0].shape[2]
    context, *kept = sm90.decode_attention(
        tuple(x[:, 0] for x in projected),
        tuple(keys),
        tuple(values),
        layer,
        cache.lengths,
        bits=cache.bits,
        tables=None if tables is None else tuple(table[:, 0] for table in tables),
        slopes=jnp.asarray(alibi_slopes(heads), jnp.float32) if alibi else None,
    )
    keys, values = map(jax.tree.unflatten, trees, kept)
    return context[:, None], dataclasses.replace(cache, keys=keys, values=values)


def _attend_on_xla(projected: Projected, cache: KVCache, layer, tables, alibi: bool):
    q, k, v = rotated_heads(projected, cache.kv_heads, tables)
    cache = cache.write(layer, k, v)
    bias = alibi_bias(q.shape[2], cache.capacity) if alibi else None
    return decode_attention(q, *cache.read(layer), cache.lengths, bias=bias), cache


def decode_attention(
    q: Float[Array, "batch 1 heads head_dim"],
    keys: Kept,
    values: Kept,
    lengths: Int[Array, " batch"],
    bias: Float[Array, "#batch #heads 1 capacity"] | None = None,
) -> Float[Array, "batch 1 heads head_dim"]:
    """One token of each sequence attends to the positions 0 ... lengths of a cache that holds it already.

    Both products are a multiplication and a sum in float32, which XLA makes one kernel that reads the cache once, where
    it lies, and widens its numbers in registers. As a dot, compiled for the H200, each came after a kernel that copies
    the layer's part of the cache, quantized codes as bfloat16; for the few rows of one token tensor cores gain nothing.
    Where query heads share a key head, the layer's values are still copied, as codes.

    Args:
      q: queries; consecutive ones share a key head.
      keys: of one layer, [batch, kv_heads, capacity, head_dim].
      values: likewise.
      lengths: position of the token in each sequence.
      bias: added to the scores after their scaling, such as ALiBi's; axes of 1 are repeated.
    """
    keys, values = _numbers(keys), _numbers(values)
    batch, _, heads, head_dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    queries = q.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
    scores = jnp.sum(row_major(queries[..., None, :] * keys[:, :, None]), axis=-1)
    if bias is not None:
        groups = (1, 1) if bias.shape[1] == 1 else scores.shape[1:3]
        scores += bias.reshape(bias.shape[0], *groups, capacity)
    visible = jnp.arange(capacity) <= lengths[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    products = row_major(weights[..., None] * values[:, :, None])
    run = _RUN if capacity % _RUN == 0 else capacity
    sums = jnp.sum(products.reshape(*products.shape[:3], -1, run, head_dim), axis=-2)
    context = jnp.sum(jax.lax.optimization_barrier(sums), axis=-2)
    return context.reshape(batch, 1, heads, head_dim).astype(q.dtype)


def _numbers(kept: Kept) -> Float[Array, "batch kv_heads capacity head_dim"]:
    """As float32, which XLA fuses into what reads it."""
    return kept.dequantize() if isinstance(kept, QuantizedHeads) else kept.astype(jnp.float32)

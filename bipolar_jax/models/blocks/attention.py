"""Attention: of whole prompts, causal; and of one new token of each sequence, to its cache."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax import ops
from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.alibi import alibi_bias, alibi_slopes
from bipolar_jax.models.blocks.cut_attention import attend_to_cut_cache
from bipolar_jax.models.blocks.rope import Tables, rotate
from bipolar_jax.models.blocks.scoring import PLAIN, Scoring, capped_attention
from bipolar_jax.models.blocks.step import Step, by_xla
from bipolar_jax.models.kv_cache.cache import Kept, KVCache, numbers_of, row_major
from bipolar_jax.ops import Explanation

# Positions are summed in runs of this length, then the runs: one sum over all has too few columns to fill a GPU, and
# XLA then writes all products to memory.
_POSITIONS_PER_SUM = 64

Heads = Float[Array, "batch length _ head_dim"]  # queries have more heads than keys
# Queries, keys and values, or one array of them all, side by side in this order.
Projected = tuple[Heads, Heads, Heads] | tuple[Heads]


def causal_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    bias: Float[Array, "#batch #heads #length length"] | None = None,
    scoring: Scoring = PLAIN,
) -> Float[Array, "batch length heads head_dim"]:
    """Every position attends to itself and to all before it, by cuDNN's flash attention where it serves the operands.

    Args:
      q: queries; consecutive ones share a key head.
      k: keys.
      v: values.
      bias: added to the scaled scores, such as ALiBi's; axes of size 1 are broadcast.
      scoring: of the layer: scale, cap and window; a cap and a bias exclude each other.

    Returns:
      The context of each query, in q's dtype.
    """
    scoring = scoring.within(q.shape[1])
    if scoring.softcap is not None:
        return capped_attention(q, k, v, scoring)
    dtype = q.dtype
    implementation = causal_implementation(default_device(), q, bias)
    if bias is not None and implementation == "cudnn":
        bias = whole_bias(bias).astype(dtype)  # a no-op for the bias of `prompts_alibi`
    if implementation == "xla":
        # Of 16-bit operands JAX asks for dots that CPUs do not have in float16, and whose gradients its own strict
        # promotion of dtypes refuses when they are compiled (jax 0.11.2).
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    options = dict(bias=bias, is_causal=True, implementation=implementation, scale=scoring.scale)

    def attend(q, k, v, window: int | None):
        near = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, **options, local_window_size=near)

    # cuDNN's has operands promoted to float32 within, which the strict setting refuses too.
    with jax.numpy_dtype_promotion("standard"):
        if scoring.window is None or scoring.windowed is None:
            return attend(q, k, v, scoring.window).astype(dtype)
        near, far = (functools.partial(attend, window=window) for window in (scoring.window, None))
        return jax.lax.cond(scoring.windowed, near, far, q, k, v).astype(dtype)


def prompts_alibi(q: Any) -> Float[Array, "1 heads #length length"]:
    """ALiBi's biases in the form that `causal_attention` passes on: [heads, length, length] for cuDNN, else one row.

    Call it before a loop over layers: cuDNN's heads * length^2 numbers, computed in the body, would be computed again
    in every iteration.

    Args:
      q: queries or their shape and dtype, [batch, length, heads, head_dim].
    """
    _, length, heads, _ = q.shape
    row = alibi_bias(heads, length)
    if causal_implementation(default_device(), q, row) != "cudnn":
        return row
    # Without the barrier XLA moves the computation, of constants alone, into the loop.
    return whole_bias(jax.lax.optimization_barrier(row)).astype(q.dtype)


def causal_implementation(device: jax.Device, q: Any, bias: Any | None) -> Literal["cudnn", "xla"]:
    """The implementation of `jax.nn.dot_product_attention` that serves these queries on this device.

    cuDNN's takes bfloat16 and float16 on NVIDIA GPUs from compute capability 8.0 on; head sizes that are a multiple of
    8, up to 128 (256 from 9.0 on); and, because of its gradient, a bias only for an even number of positions.

    Args:
      device: where it will run.
      q: array or its shape and dtype, [batch, length, heads, head_dim].
      bias: likewise, [batch or 1, heads or 1, length or 1, length], or None.
    """
    # AMD's GPUs have the same platform; their capability is a name such as gfx90a.
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
    """The bias with a row for each query, as cuDNN needs it.

    One row for all queries is shifted by query so that the bias of its own position is 0; softmax ignores a shift
    that all keys of a query share. In long texts ALiBi's slope * key is too large for bfloat16; slope * distance is
    not.
    """
    return bias if bias.shape[2] == bias.shape[3] else bias - jnp.swapaxes(bias, 2, 3)


def separate_heads(projected: Projected, kv_heads: int) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values as three arrays."""
    if len(projected) == 3:
        return projected
    (whole,) = projected
    heads = whole.shape[2] - 2 * kv_heads
    return tuple(jnp.split(whole, (heads, heads + kv_heads), axis=2))


def rotated_heads(projected: Projected, kv_heads: int, tables: Tables | None) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values as three arrays; q and k rotated if there are tables."""
    q, k, v = separate_heads(projected, kv_heads)
    return (q, k, v) if tables is None else (rotate(q, tables), rotate(k, tables), v)


def attend_to_cache(
    projected: Projected,
    cache: KVCache,
    layer: Int[Array, ""],
    tables: Tables | None = None,
    *,
    alibi: bool = False,
    scoring: Scoring = PLAIN,
) -> tuple[Float[Array, "batch 1 heads head_dim"], KVCache]:
    """One token of each sequence enters the cache and attends to it: by one kernel where a backend has it, else by XLA.

    Both give the same numbers up to rounding. A sequence that fills the cache attends to the cache alone.

    Args:
      projected: of the token, [batch, 1, heads, head_dim] each; consecutive queries share a key head.
      cache: `lengths` are the token's positions.
      layer: index of the cache's layer to write and to read.
      tables: cosines and sines that q and k are rotated by first, see `rope.rope_tables`.
      alibi: whether to add ALiBi's biases to the scores.
      scoring: of the layer: scale, cap and window.

    Returns:
      The context of the queries; and the cache with the token written and not yet counted.
    """
    try:
        return attend_in_one_kernel(projected, cache, layer, tables, alibi, scoring)
    except Unsupported:
        return _attend_on_xla(projected, cache, layer, tables, alibi, scoring)


def attend_in_one_kernel(
    projected: Projected,
    cache: KVCache,
    layer: Int[Array, ""],
    tables: Tables | None,
    alibi: bool,
    scoring: Scoring = PLAIN,
) -> tuple[Float[Array, "batch 1 heads head_dim"], KVCache]:
    """`attend_to_cache` by `ops.decode_attention`. Raises Unsupported as that does, and for another scoring."""
    operands, options = _fused_operands(projected, cache, layer, tables, alibi, scoring)
    context, *leaves = ops.decode_attention(*operands, **options)
    keys, values = map(jax.tree.unflatten, map(jax.tree.structure, (cache.keys, cache.values)), leaves)
    return context[:, None], dataclasses.replace(cache, keys=keys, values=values)


def explain_attention_to_cache(
    projected: Projected,
    cache: KVCache,
    layer: Int[Array, ""],
    tables: Tables | None = None,
    *,
    alibi: bool = False,
    scoring: Scoring = PLAIN,
) -> Step:
    """What `attend_to_cache` runs for these operands."""
    name = "attention" if tables is None else "rotation, attention"
    try:
        operands, options = _fused_operands(projected, cache, layer, tables, alibi, scoring)
        return Step(f"{name}, cache write", ops.explain(ops.decode_attention, *operands, **options))
    except Unsupported as reason:
        runs = by_xla("cache write, then multiplications and sums in float32", "serves every cache")
        return Step(f"{name}, cache write", runs, str(reason))


def _fused_operands(
    projected: Projected, cache: KVCache, layer, tables, alibi: bool, scoring: Scoring
) -> tuple[tuple, dict[str, Any]]:
    """Operands and options of `ops.decode_attention`.

    XLA rotates q and k before where a part of each head is rotated, or keys are kept in another basis.

    Raises:
      Unsupported: another scoring than the kernel's; a cache whose positions devices share.
    """
    if cache.cut is not None:
        raise Unsupported(f"{cache.cut.parts} devices share the positions, and the kernel gives no partial results")
    head_dim = projected[0].shape[-1]
    if (differs := scoring.differs(cache.capacity, head_dim)) is not None:
        raise Unsupported(differs)
    if cache.key_rotation is not None or (tables is not None and 2 * tables[0].shape[-1] != head_dim):
        q, k, v = rotated_heads(projected, cache.kv_heads, tables)
        projected, tables = (cache.rotate(q), cache.rotate(k), v), None
    keys, values = (tuple(jax.tree.leaves(kept)) for kept in (cache.keys, cache.values))
    heads = sum(x.shape[2] for x in projected) - 2 * cache.kv_heads
    operands = (tuple(x[:, 0] for x in projected), keys, values, layer, cache.lengths)
    options = dict(
        bits=cache.bits,
        tables=None if tables is None else tuple(table[:, 0] for table in tables),
        slopes=jnp.asarray(alibi_slopes(heads), jnp.float32) if alibi else None,
    )
    return operands, options


def explain_causal(q: Any, bias: Any | None, scoring: Scoring = PLAIN) -> Step:
    """What `causal_attention` runs for queries and a bias, or their shapes and dtypes."""
    if scoring.softcap is not None:
        return Step("attention", by_xla("dot products and softmax", "scores are capped, which cuDNN does not compute"))
    if causal_implementation(default_device(), q, bias) == "cudnn":
        return Step("attention", Explanation("cudnn", "flash attention", None, "fused on NVIDIA GPUs", {}))
    return Step("attention", by_xla("dot products and softmax", "cuDNN does not serve these heads or this device"))


def _attend_on_xla(projected: Projected, cache: KVCache, layer, tables, alibi: bool, scoring: Scoring):
    q, k, v = rotated_heads(projected, cache.kv_heads, tables)
    cache = cache.write(layer, k, v)
    if cache.cut is not None:
        return attend_to_cut_cache(cache.rotate(q), cache, layer, scoring), cache
    bias = alibi_bias(q.shape[2], cache.capacity) if alibi else None
    return decode_attention(cache.rotate(q), *cache.read(layer), cache.lengths, bias=bias, scoring=scoring), cache


def decode_attention(
    q: Float[Array, "batch 1 heads head_dim"],
    keys: Kept,
    values: Kept,
    lengths: Int[Array, " batch"],
    bias: Float[Array, "#batch #heads 1 capacity"] | None = None,
    scoring: Scoring = PLAIN,
) -> Float[Array, "batch 1 heads head_dim"]:
    """One token of each sequence attends to the positions 0 ... lengths of a cache that already holds it.

    Both products are a multiplication and a sum in float32: XLA fuses each into one kernel, which reads the cache in
    place and widens its numbers in registers. Before a dot XLA copies the layer's part of the cache, quantized codes as
    bfloat16; and the few rows of one token gain nothing from tensor cores. Where query heads share a key head, the
    layer's values are still copied, as codes.

    Args:
      q: queries; consecutive ones share a key head.
      keys: of one layer, [batch, kv_heads, capacity, head_dim].
      values: likewise.
      lengths: position of the token in each sequence.
      bias: added to the scaled scores, such as ALiBi's; axes of size 1 are broadcast.
      scoring: of the layer: scale, cap and window.

    Returns:
      The context of the queries, in their dtype.
    """
    keys, values = numbers_of(keys), numbers_of(values)
    batch, _, heads, head_dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    queries = q.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim) * scoring.factor(head_dim)
    scores = jnp.sum(row_major(queries[..., None, :] * keys[:, :, None]), axis=-1)
    if bias is not None:
        groups = (1, 1) if bias.shape[1] == 1 else scores.shape[1:3]
        scores += bias.reshape(bias.shape[0], *groups, capacity)
    visible = scoring.within(capacity).visible(lengths[:, None], jnp.arange(capacity, dtype=jnp.int32)[None])
    scores = scoring.capped(scores)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    products = row_major(weights[..., None] * values[:, :, None])
    run = _POSITIONS_PER_SUM if capacity % _POSITIONS_PER_SUM == 0 else capacity
    sums = jnp.sum(products.reshape(*products.shape[:3], -1, run, head_dim), axis=-2)
    context = jnp.sum(jax.lax.optimization_barrier(sums), axis=-2)
    return context.reshape(batch, 1, heads, head_dim).astype(q.dtype)

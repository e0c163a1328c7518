"""Attention of new tokens to a cache whose positions several devices share: partial results, then one exchange."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.models.blocks.scoring import Scoring
from bipolar_jax.models.kv_cache.cache import KVCache, numbers_of
from bipolar_jax.models.kv_cache.cut_positions import CutPositions


class Partial(NamedTuple):
    """Softmax over some positions, not yet divided by the sum of all weights.

    Attributes:
      largest: largest score; -inf where no position is visible.
      total: sum of exp(score - largest).
      context: the same sum of the values.
    """

    largest: Float[Array, "*rows"]
    total: Float[Array, "*rows"]
    context: Float[Array, "*rows head_dim"]


def attend_to_cut_cache(
    q: Float[Array, "batch 1 heads head_dim"], cache: KVCache, layer: Int[Array, ""], scoring: Scoring
) -> Float[Array, "batch 1 heads head_dim"]:
    """`attention.decode_attention`, up to the rounding of sums, to a cache that devices share.

    Devices that share a head of keys gather their queries, attend to their own positions, and exchange partial results
    once, so that each has the whole context of its own queries: parts - 1 times heads * (head_dim + 2) float32 numbers
    a text and device.

    Args:
      q: this device's queries, in the basis of the cached keys.
      cache: with `cut`; it holds the new token.
      layer: index of the cache's layer.
      scoring: of the layer.
    """
    cut = cache.cut
    batch, _, heads, head_dim = q.shape
    exchange = {"axis_name": cut.axis, "axis_index_groups": cut.groups}
    queries = jax.lax.all_gather(q[:, 0], axis=1, tiled=True, **exchange).astype(jnp.float32)
    keys, values = (numbers_of(kept) for kept in cache.read(layer))
    visible = _visible(cut, cache.lengths, scoring)
    found = partial_attention(queries * scoring.factor(head_dim), keys, values, visible, scoring)
    packed = jnp.concatenate([found.largest[..., None], found.total[..., None], found.context], axis=-1)
    packed = packed.reshape(batch, cut.parts, heads, head_dim + 2)
    packed = jax.lax.all_to_all(packed, split_axis=1, concat_axis=0, **exchange)
    return combined(Partial(packed[..., 0], packed[..., 1], packed[..., 2:]))[:, None].astype(q.dtype)


def partial_attention(
    queries: Float[Array, "batch heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    visible: Bool[Array, "batch slots"],
    scoring: Scoring,
) -> Partial:
    """Attention of one token of each text to some of its positions, float32.

    Args:
      queries: scaled; consecutive ones share a key head.
      keys, values: of these positions.
      visible: which of them the token attends to.
      scoring: has the cap of scores.
    """
    batch, heads, head_dim = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, 1, head_dim)
    scores = scoring.capped(jnp.sum(grouped * keys[:, :, None], axis=-1))
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(largest == -jnp.inf, 0.0, largest)[..., None])
    context = jnp.sum(weights[..., None] * values[:, :, None], axis=-2)
    found = Partial(largest, jnp.sum(weights, axis=-1), context)
    return Partial(*(each.reshape(batch, heads, *each.shape[3:]) for each in found))


def combined(partial: Partial) -> Float[Array, "batch heads head_dim"]:
    """The context of all positions, from partial results along a leading axis, at least one of them with a position."""
    weights = jnp.exp(partial.largest - jnp.max(partial.largest, axis=0, keepdims=True))
    total = jnp.sum(weights * partial.total, axis=0)
    return jnp.sum(weights[..., None] * partial.context, axis=0) / total[..., None]


def _visible(cut: CutPositions, lengths: Int[Array, " batch"], scoring: Scoring) -> Bool[Array, "batch slots"]:
    """Whether the token at `lengths` attends to this device's slots."""
    positions = cut.positions()[None]
    return scoring.within(cut.capacity).visible(lengths[:, None], positions) & (positions < cut.capacity)

"""How scores of queries and keys become weights in models that cap them, scale them otherwise, or have windows."""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.config import TransformerConfig

# Queries whose scores are in memory at once; all of a text need length^2 numbers a head.
_QUERIES_AT_ONCE = 512
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scoring:
    """Where attention differs from softmax(q k / sqrt(head_dim)) over all earlier positions.

    Attributes:
      scale: factor on the scores; None is head_dim^-0.5.
      softcap: cap c of the scaled scores, c tanh(score / c); or None.
      window: positions that are attended to, the query's own included; None is all.
      windowed: whether the layer has the window, or of every layer, see `at`; None where all layers are alike.
    """

    scale: float | None = dataclasses.field(default=None, metadata=_STATIC)
    softcap: float | None = dataclasses.field(default=None, metadata=_STATIC)
    window: int | None = dataclasses.field(default=None, metadata=_STATIC)
    windowed: Bool[Array, "*layers"] | None = None

    @classmethod
    def of(cls, config: TransformerConfig) -> Self:
        """That of a model, of all its layers."""
        windowed = None
        if config.window_layers is not None:
            windowed = jnp.asarray(np.array([config.has_window(layer) for layer in range(config.num_layers)]))
        return cls(config.attention_scale, config.attention_softcap, config.window, windowed)

    def at(self, layer: Int[Array, ""]) -> Self:
        """That of one layer."""
        return self if self.windowed is None else dataclasses.replace(self, windowed=self.windowed[layer])

    def within(self, positions: int) -> Self:
        """The same for texts, or a cache, of so many positions: a window that holds them all is none."""
        return self if self.window is None or self.window < positions else dataclasses.replace(self, window=None)

    def differs(self, positions: int, head_dim: int) -> str | None:
        """What a kernel of plain attention to so many positions does not compute, in words; None if nothing."""
        if self.softcap is not None:
            return "scores are capped"
        if self.scale is not None and self.scale != head_dim**-0.5:
            return f"scores are scaled by {self.scale:.4g}, not by head_dim^-0.5"
        if self.within(positions).window is not None:
            return f"layers attend to a window of {self.window} positions, the cache has {positions}"
        return None

    def factor(self, head_dim: int) -> float:
        """The factor on scores."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def capped(self, scores: Float[Array, "*scores"]) -> Float[Array, "*scores"]:
        """The scores after the cap."""
        return cap(scores, self.softcap)

    def visible(self, queries: Int[Array, "#q #k"], keys: Int[Array, "#q #k"]) -> Bool[Array, "q k"]:
        """Whether queries at these positions attend to keys at those."""
        causal = keys <= queries
        if self.window is None:
            return causal
        near = keys > queries - self.window
        return causal & (near if self.windowed is None else near | ~self.windowed)


PLAIN = Scoring()  # that of most models


def cap(x: Float[Array, "*shape"], most: float | None) -> Float[Array, "*shape"]:
    """most * tanh(x / most), as Gemma 2 caps scores and logits (arXiv 2408.00118); None leaves x."""
    return x if most is None else most * jnp.tanh(x / most)


def capped_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    scoring: Scoring,
) -> Float[Array, "batch length heads head_dim"]:
    """Causal attention with capped scores by XLA, some queries after the others; softmax in float32, q's dtype."""
    batch, length, heads, head_dim = q.shape
    dtype, kv_heads = q.dtype, k.shape[2]
    if default_device().platform == "cpu":  # whose XLA has no dots of float16
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    block = math.gcd(length, _QUERIES_AT_ONCE)
    block = length if block < 64 else block
    keys = jnp.arange(length, dtype=jnp.int32)

    def attend(start: Int[Array, ""]) -> Float[Array, "batch block heads head_dim"]:
        rows = jax.lax.dynamic_slice_in_dim(q, start, block, axis=1).reshape(batch, block, kv_heads, -1, head_dim)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", rows, k, preferred_element_type=jnp.float32)
        scores = scoring.capped(scores * scoring.factor(head_dim))
        visible = scoring.visible(start + jnp.arange(block, dtype=jnp.int32)[:, None], keys[None])
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
        context = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v, preferred_element_type=jnp.float32)
        return context.reshape(batch, block, heads, head_dim).astype(dtype)

    blocks = jax.lax.map(attend, jnp.arange(0, length, block, dtype=jnp.int32))
    return jnp.moveaxis(blocks, 0, 1).reshape(batch, length, heads, head_dim)

"""The contract of every backend: products with packed weights, and operations that fuse several steps of a layer.

A backend is a module (`reference`, `xla`, `sm90`) with the functions of `Backend`. Operands are arrays that `ops` has
validated; nothing here is differentiable. A backend that cannot serve a request raises `Unsupported`, and the
dispatcher in `ops` tries the next one.

Every operation has a planner that applies the same checks and runs nothing: `plan_matmul` for the products, and
`plan_NAME` for each fused operation NAME, which takes the operands of NAME, or anything with their shapes and dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.kernels.semantics.rotation import FixedPointTables
from bipolar_jax.packing import BipolarArray

# Up to this many tokens a product is bound by reading the weights: kernels for few tokens take the weights as rows of
# the instruction and read each bit plane once.
FEW_TOKENS_LIMIT = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a backend would run for one request.

    Attributes:
      kernel: in words.
      reason: why this kernel and this tiling.
      tiling: the kernel's tile sizes and the like, if it has any to choose.
    """

    kernel: str
    reason: str
    tiling: Any = None


class Layer(NamedTuple):
    """One of the products of an operation that has several.

    Attributes:
      w: packed weights of logical shape [k, n].
      a_format: the grid that the input is quantized to.
      bias: added to every row, or None.
    """

    w: BipolarArray
    a_format: BipolarFormat
    bias: Float[Array, " n"] | None


# The leaves of cached keys or of cached values: (numbers,) as floats [layers, batch, kv_heads, capacity, head_dim]; or
# (codes, scales, zeros) of 8 or 4 bits, the last two without the axis of head_dim, as `models.kv_cache` stores them.
CacheLeaves = tuple[Array, ...]
Cache = Float[Array, "layers batch kv_heads capacity head_dim"]
Heads = Float[Array, "batch length _ head_dim"]  # queries have more heads than keys


class Backend(Protocol):
    """Products with a packed right operand of logical shape [k, n]; their sums are sums of integers."""

    def integer_matmul(
        self, codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat
    ) -> Int[Array, "m n groups"]:
        """The sum over the k of each group of value(codes) * value(w), exact in int32.

        Integer groups have values that are summed over all of K: the result is [m, n, 1].
        """

    def quantized_matmul(
        self,
        x: Float[Array, "m columns"],
        w: BipolarArray,
        a_format: BipolarFormat,
        bias: Float[Array, " n"] | None,
        prologue: Prologue | None = None,
        residual: Float[Array, "m out"] | None = None,
        activation: Activation | None = None,
    ) -> Float[Array, "m out"]:
        """Quantizes prologue(x) as `activations.quantize_tokens`, multiplies integers, and scales.

        Args:
          x: bfloat16, float16 or float32; k numbers a row, or as many as the prologue reduces to k.
          w: packed weights [k, n].
          a_format: the grid of the tokens.
          bias: added in float32.
          prologue: a norm or an activation function, see `semantics.prologue`.
          residual: in x's dtype; added after the cast to it.
          activation: applied in float32 to the product and its bias; a gated one makes n / 2 columns.

        Returns:
          [m, n], or [m, n / 2] for a gated activation, in x's dtype.
        """

    def weight_only_matmul(
        self,
        x: Float[Array, "m k"],
        w: BipolarArray,
        bias: Float[Array, " n"] | None,
        residual: Float[Array, "m out"] | None = None,
        activation: Activation | None = None,
    ) -> Float[Array, "m out"]:
        """x times the dequantized w, accumulated in float32; the output is in x's dtype.

        Residual and activation are as in `quantized_matmul`, but the activation follows the cast to x's dtype.
        """

    def plan_matmul(self, m: int, dtype: jnp.dtype, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
        """The plan of `quantized_matmul`, or of `weight_only_matmul` if a_format is None, for m rows of `dtype`.

        Raises:
          Unsupported: as the product itself would.
        """

    def pack_weights(
        self,
        w: Float[Array, "k n"],
        half_steps: Float[Array, "n groups"],
        offset: Float[Array, "n groups"] | None,
        number_format: BipolarFormat,
        group_size: int | None,
    ) -> tuple[UInt32[Array, "planes n words"], Int[Array, "n groups"]]:
        """Bit planes and row sums of the rounded weights; the bits of `semantics.weights.pack_weights`."""

    def prompt_heads(
        self,
        x: Float[Array, "batch length columns"],
        w: BipolarArray,
        a_format: BipolarFormat,
        bias: Float[Array, " n"] | None,
        prologue: Prologue | None,
        keys: Cache,
        values: Cache,
        layer: Int[Array, ""],
        tables: FixedPointTables | None = None,
        head_norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> tuple[Heads, Heads, Heads, Cache, Cache]:
        """prologue(x) @ w + bias of whole prompts, split into heads, rotated, and written to one layer of the cache.

        The product is that of `quantized_matmul` in float32. Queries and keys are rotated before the only rounding, to
        x's dtype. Positions of the layer from `length` on become zeros.

        Args:
          x: bfloat16 or float16.
          w: packed weights [k, n]; the columns are the heads of queries, of keys and of values, side by side.
          a_format: the grid of the tokens.
          bias: added to every row.
          prologue: a norm or an activation function of x.
          keys, values: the whole cache, in x's dtype; written in place where the caller donates them.
          layer: index of the cache's layer.
          tables: cosines and sines of the positions 0, 1, 2 ...; pairs are (d, d + head_dim / 2). None does not rotate.
          head_norms: of each head of queries and of keys, [head_dim], before the rotation; None where there are none.

        Returns:
          q, k and v, in x's dtype; keys; values.

        Raises:
          ValueError: prompts longer than the cache; shapes that do not fit.
          Unsupported: what the backend's kernel does not serve.
        """

    def decode_attention(
        self,
        projected: tuple[Float[Array, "batch _ head_dim"], ...],
        keys: CacheLeaves,
        values: CacheLeaves,
        layer: Int[Array, ""],
        lengths: Int[Array, " batch"],
        *,
        bits: int | None = None,
        tables: tuple[Float[Array, "batch half"], Float[Array, "batch half"]] | None = None,
        slopes: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "batch heads head_dim"], CacheLeaves, CacheLeaves]:
        """One new token of each sequence attends to the positions before `lengths` and to itself, and is cached.

        A sequence whose length is the capacity attends to the cache alone, and the cache stays as it is.

        Args:
          projected: q, k and v of the new token, or one array with all their heads in this order; consecutive queries
            share a key head.
          keys, values: leaves of the whole cache; written in place where the caller donates them.
          layer: index of the cache's layer.
          lengths: tokens that each sequence has in the cache.
          bits: of the cached numbers, 8 or 4; None for floats.
          tables: float32 cosines and sines that q and k are rotated by first.
          slopes: ALiBi's, float32; slope * position is added to the scaled scores.

        Returns:
          The context of the queries, in their dtype; keys; values.

        Raises:
          ValueError: shapes that do not fit.
          Unsupported: what the backend's kernel does not serve.
        """

    def decode_layers(
        self,
        hidden: Float[Array, "texts hidden"],
        kernels: dict[str, BipolarArray],
        biases: dict[str, Float[Array, "layers n"] | None],
        norms: dict[str, RMSNorm | LayerNorm],
        activation: Activation,
        keys: CacheLeaves,
        values: CacheLeaves,
        lengths: Int[Array, " texts"],
        tables: tuple[Float[Array, "texts half"], Float[Array, "texts half"]] | None,
        slopes: Float[Array, " heads"] | None,
        a_format: BipolarFormat | None,
        *,
        cache_bits: int | None = None,
        spans: Mapping[str, float] | None = None,
        first_layer: int = 0,
        key_rotation: Hadamard | None = None,
    ) -> tuple[Float[Array, "texts hidden"], Float[Array, "layers texts qkv"]]:
        """All layers of a pre-norm decoder for one new token of each text; float32 between products.

        Args:
          hidden: of the new tokens.
          kernels: of the products "qkv", "o", "up" and "down", each of all layers: [layers, k, n].
          biases: of the same products, or None.
          norms: before attention ("qkv") and before the feed-forward block ("up"); vectors are [layers, hidden]. Also
            of each head of "queries" and "keys" before `tables`, [layers, head_dim], where the model has them.
          activation: of the feed-forward block; it may have a rotation, of the input of "down".
          keys, values: leaves of the cache, without the new tokens; they are not written.
          lengths: tokens of each text in the cache, which is the position of the new one.
          tables: cosines and sines of these positions; None where positions are not rotary.
          slopes: ALiBi's; None without ALiBi.
          a_format: the grid of the tokens, the same for all products; None if they stay floats.
          cache_bits: of the cached numbers, 8 or 4; None for floats.
          spans: of the tokens of each product, see `BipolarFormat.span`; None is 1 for all.
          first_layer: index in the cache of the first of these layers: the cache may be that of more layers.
          key_rotation: of each head of queries and keys, after `tables`; cached keys are rotated already.

        Returns:
          float32: the hidden states after all layers, before the final norm; and for every layer the tokens' queries,
          keys and values, before rotation.

        Raises:
          Unsupported: what the backend's kernel does not serve.
        """

    def feed_forward(
        self,
        x: Float[Array, "m columns"],
        up: Layer,
        down: Layer,
        prologue: Prologue | None,
        activation: Activation | None,
        residual: Float[Array, "m out"],
    ) -> Float[Array, "m out"]:
        """residual + down(activation(up(prologue(x)))), all in x's dtype.

        The numbers are those of two calls of `quantized_matmul`. Tokens of `down` whose scale is 0, Inf or NaN are the
        exception: there both ways give zeros, NaN or Inf (and a bias), but not always the same of them.

        Raises:
          Unsupported: what the backend's kernel does not serve.
        """

    def plan_prompt_heads(self, *operands: Any, **options: Any) -> Plan:
        """The plan of `prompt_heads` for these operands; raises as it would."""

    def plan_decode_attention(self, *operands: Any, **options: Any) -> Plan:
        """The plan of `decode_attention` for these operands; raises as it would."""

    def plan_decode_layers(self, *operands: Any, **options: Any) -> Plan:
        """The plan of `decode_layers` for these operands; raises as it would."""

    def plan_feed_forward(self, *operands: Any, **options: Any) -> Plan:
        """The plan of `feed_forward` for these operands; raises as it would."""

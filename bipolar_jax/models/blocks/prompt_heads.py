"""Queries, keys and values of prompts, rotated and cached in the product that makes them, or after it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax import ops
from bipolar_jax.kernels.semantics.rotation import LARGEST_AMPLITUDE, FixedPointTables, fixed_point_tables
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.attention import Heads, Projected, rotated_heads, separate_heads
from bipolar_jax.models.blocks.norm import Norm, as_prologue, normalize, project
from bipolar_jax.models.blocks.rope import Tables, TablesByKind, rope_frequencies
from bipolar_jax.models.blocks.step import Step, by_xla, product_step
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.nn import Linear, fuses

# Rows of the largest tile of the fused operation's kernel: tables padded to it need no copy in each layer.
_TILE_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Projections:
    """A layer's queries, keys and values before they are computed.

    Attributes:
      layers: the layer of each of the three, or the one that makes all, see `join_projections`.
      norm: of their input.
      x: the input, before the norm.
      head_dim: numbers of a head.
      head_norms: of each head of queries and of keys; None where the model has none.
      kv_heads: heads of keys, and of values; needed with `head_norms`.
    """

    layers: list[nnx.Linear | Linear]
    norm: Norm
    x: Float[Array, "batch length hidden"]
    head_dim: int
    head_norms: tuple[Norm, Norm] | None = None
    kv_heads: int = 0

    def heads(self) -> Projected:
        """The projections, queries and keys normalized, not rotated."""
        products = project(self.layers, self.norm, self.x)
        heads = tuple(product.reshape(*product.shape[:2], -1, self.head_dim) for product in products)
        if self.head_norms is None:
            return heads
        q, k, v = separate_heads(heads, self.kv_heads)
        q_norm, k_norm = self.head_norms
        return normalize(q_norm, q), normalize(k_norm, k), v

    def empty_heads(self) -> Projected:
        """Arrays of the shapes and dtype of `heads`, to plan with: nothing is computed."""
        sizes = [layer.kernel.get_value().shape[-1] for layer in self.layers]
        shape = self.x.shape[:2]
        heads = tuple(jnp.zeros((*shape, size // self.head_dim, self.head_dim), self.x.dtype) for size in sizes)
        return heads if self.head_norms is None else separate_heads(heads, self.kv_heads)

    def explain(self, not_fused: str | None = None) -> list[Step]:
        """What `heads` runs."""
        names = ("qkv",) if len(self.layers) == 1 else ("q", "k", "v")
        first, *others = (product_step(name, layer, self.x) for name, layer in zip(names, self.layers, strict=True))
        steps = [dataclasses.replace(first, not_fused=not_fused), *others]
        if self.head_norms is not None:
            steps.append(Step("norms of q and k", by_xla("elementwise kernels", "after the product, head by head")))
        return steps


class PromptTables(NamedTuple):
    """Cosines and sines of the positions of prompts.

    Attributes:
      exact: float32.
      fixed_point: as `ops.prompt_heads` takes them, made once for all layers; None if the amplitude does not fit.
    """

    exact: Tables
    fixed_point: FixedPointTables | None


def prompt_tables(
    config: TransformerConfig, tables: Tables | TablesByKind[Tables]
) -> PromptTables | TablesByKind[PromptTables]:
    """Both forms of the tables that `rope_tables` gives for the positions 0, 1, 2 ... of any number of prompts."""
    if isinstance(tables, TablesByKind):
        return TablesByKind(*(prompt_tables(config, each) for each in tables))
    _, amplitude = rope_frequencies(config)
    fits = abs(amplitude) <= LARGEST_AMPLITUDE
    return PromptTables(tables, fixed_point_tables(tables, _TILE_ROWS) if fits else None)


def prompt_heads(
    projections: Projections, kv_heads: int, tables: PromptTables | None, cache: KVCache | None, layer: Int[Array, ""]
) -> tuple[Heads, Heads, Heads, KVCache | None]:
    """Queries, keys and values, the first two rotated if there are tables; and the cache with the layer filled.

    `ops.prompt_heads` does it in one kernel where the projections are packed and joined and the cache holds floats. It
    rounds rotated numbers once, and cosines and sines to multiples of 2^-14; otherwise projections are rounded before
    the rotation, too.

    Args:
      projections: of prompts, from their first tokens on.
      kv_heads: heads of keys, and of values.
      tables: of positions, see `prompt_tables`.
      cache: of all layers, or None to keep nothing.
      layer: index of the cache's layer to fill.

    Raises:
      ValueError: prompts longer than the cache.
    """
    try:
        implementation, operands = _fused_operands(projections, tables, cache, layer)
        q, k, v, keys, values = ops.prompt_heads(*operands, implementation=implementation)
    except Unsupported:
        q, k, v = rotated_heads(projections.heads(), kv_heads, None if tables is None else tables.exact)
        return q, k, v, cache if cache is None else cache.write_prompts(layer, k, v)
    return q, k, v, dataclasses.replace(cache, keys=keys, values=values)


def explain_prompt_heads(
    projections: Projections, tables: PromptTables | None, cache: KVCache | None, layer: Int[Array, ""]
) -> list[Step]:
    """What `prompt_heads` runs for these operands."""
    try:
        implementation, operands = _fused_operands(projections, tables, cache, layer)
        runs = ops.explain(ops.prompt_heads, *operands, implementation=implementation)
    except Unsupported as reason:
        rotation = "cache write" if tables is None else "rotation, cache write"
        return [*projections.explain(str(reason)), Step(rotation, by_xla("elementwise kernels", "after the product"))]
    return [Step("qkv, cache write" if tables is None else "qkv, rotation, cache write", runs)]


def _fused_operands(
    projections: Projections, tables: PromptTables | None, cache: KVCache | None, index: Int[Array, ""]
) -> tuple[str, tuple]:
    """The backend and the operands of `ops.prompt_heads`.

    Raises:
      Unsupported: no cache, or a quantized one; projections that are not joined or not packed; float activations;
        tables that do not fit 16 bits, or rotate a part of each head.
    """
    if cache is None or cache.bits is not None:
        raise Unsupported("heads leave a product to a cache of floats")
    if cache.cut is not None:
        raise Unsupported(f"{cache.cut.parts} devices share the positions of the cache")
    if tables is not None and 2 * tables.exact[0].shape[-1] != projections.head_dim:
        raise Unsupported("the kernel rotates whole heads, the model a part of each")
    (layer, *others) = projections.layers
    if others or not fuses(layer):
        raise Unsupported("heads leave one product, of one packed layer")
    if layer.token_axes is not None:
        raise Unsupported(f"codes of tokens are gathered from the devices of {layer.token_axes}")
    if layer.precision.a_bits is None:
        raise Unsupported("heads leave a product of integers")
    if tables is not None and tables.fixed_point is None:
        raise Unsupported("cosines and sines are too large for the kernel's 16-bit integers")
    bias = None if layer.bias is None else jnp.asarray(layer.bias[...])
    norms = projections.head_norms
    return layer.implementation, (
        projections.x,
        layer.kernel.get_value(),
        layer.precision.a_format,
        bias,
        as_prologue(projections.norm),
        cache.keys,
        cache.values,
        index,
        None if tables is None else tables.fixed_point,
        *(() if norms is None else (tuple(as_prologue(norm) for norm in norms),)),
    )

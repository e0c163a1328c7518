"""Queries, keys and values of prompts, rotated and cached: on Hopper by the product that makes them, else after it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels import sm90
from bipolar_jax.kernels.semantics.rotation import LARGEST_AMPLITUDE, FixedPointTables, fixed_point_tables
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.attention import Heads, Projected, rotated_heads
from bipolar_jax.models.blocks.norm import Norm, as_prologue, project
from bipolar_jax.models.blocks.rope import Tables, rope_frequencies
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.nn import Linear
from bipolar_jax.ops.matmul import check_operands
from bipolar_jax.quantize.precision import activation_format

_TILE_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Projections:
    """A layer's queries, keys and values before they are computed.

    Attributes:
      layers: for each of them, or the one that makes all, see `join_projections`.
      norm: of their input.
      x: that input before the norm.
      head_dim: numbers of a head.
    """

    layers: list[nnx.Linear | Linear]
    norm: Norm
    x: Float[Array, "batch length hidden"]
    head_dim: int

    def heads(self) -> Projected:
        """Computed, and not rotated."""
        products = project(self.layers, self.norm, self.x)
        return tuple(product.reshape(*product.shape[:2], -1, self.head_dim) for product in products)


class PromptTables(NamedTuple):
    """Cosines and sines of prompts' positions.

    Attributes:
      exact: float32.
      fixed_point: as the Hopper kernel takes them, made once in place of in every layer; None if they do not fit.
    """

    exact: Tables
    fixed_point: FixedPointTables | None


def prompt_tables(config: TransformerConfig, tables: Tables) -> PromptTables:
    """Both kinds of what `rope_tables` gives for the positions 0, 1, 2 ... of any number of prompts."""
    _, amplitude = rope_frequencies(config)
    fits = abs(amplitude) <= LARGEST_AMPLITUDE
    return PromptTables(tables, fixed_point_tables(tables, _TILE_ROWS) if fits else None)


def prompt_heads(
    projections: Projections, kv_heads: int, tables: PromptTables | None, cache: KVCache | None, layer: Int[Array, ""]
) -> tuple[Heads, Heads, Heads, KVCache | None]:
    """Queries, keys and values, the first two rotated if there are tables; and the cache with the layer filled.

    On Hopper GPUs one kernel does it (`sm90.prompt_heads`) where projections are packed and joined and the cache is
    one of floats; it rounds rotated numbers to their dtype once, where else they are rounded before the rotation, too,
    and cosines and sines to multiples of 2^-14.

    Args:
      projections: of prompts from their first tokens on.
      kv_heads: heads of keys, and of values.
      tables: of positions, see `prompt_tables`.
      cache: of all layers, or None to keep nothing.
      layer: the cache's layer to fill.

    Raises:
      ValueError: prompts longer than the cache.
    """
    try:
        return _on_sm90(projections, tables, cache, layer)
    except Unsupported:
        q, k, v = rotated_heads(projections.heads(), kv_heads, None if tables is None else tables.exact)
        return q, k, v, cache if cache is None else cache.write_prompts(layer, k, v)


def _on_sm90(projections: Projections, tables: PromptTables | None, cache: KVCache | None, index):
    if cache is None or cache.bits is not None:
        raise Unsupported("heads leave a product to a cache of floats")
    (layer, *others) = projections.layers
    if others or not isinstance(layer, Linear) or layer.implementation not in ("auto", "sm90"):
        raise Unsupported("heads leave one product, of one packed layer")
    if layer.precision.a_bits is None:
        raise Unsupported("heads leave a product of integers")
    if tables is not None and tables.fixed_point is None:
        raise Unsupported("cosines and sines are too large for the kernel's integers")
    x, w = projections.x, layer.kernel.get_value()
    a_format, prologue = activation_format(layer.precision.a_bits), as_prologue(projections.norm)
    bias = None if layer.bias is None else jnp.asarray(layer.bias[...])
    check_operands(x, w, a_format, bias, prologue)
    fixed_point = None if tables is None else tables.fixed_point
    q, k, v, keys, values = sm90.prompt_heads(
        x, w, a_format, bias, prologue, cache.keys, cache.values, index, fixed_point
    )
    return q, k, v, dataclasses.replace(cache, keys=keys, values=values)

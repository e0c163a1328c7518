"""How the layers are divided: rows of the output over blocks, K over warpgroups, shared memory over its uses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, K_SLICE
from bipolar_jax.kernels.unsupported import Unsupported

WARPGROUPS = 4  # that compute; a fifth loads weights
TILE = 32  # rows of the output (columns of the weights) in a tile
CHUNK_POSITIONS = 64  # of the cache, in a chunk
HEAD_DIM = 128
PARTIAL_SIZE = HEAD_DIM + TILE  # floats of a block's partial attention
PRODUCTS = ("qkv", "o", "up", "down")
WAIT_LIMIT_MS = 2000  # a whole step takes some milliseconds
_MAX_SPLITS = 16  # partial attentions that one thread combines


class Layers(NamedTuple):
    """The consecutive layers that a launch computes: `first` may be traced, `count` is static."""

    first: Any
    count: int


@dataclasses.dataclass(frozen=True)
class Product:
    """One of a layer's four products, divided over blocks and warpgroups.

    A block computes `rows` consecutive rows of each half of the output, in tiles of 32. Its warpgroups take K slices
    round-robin.

    Attributes:
      n, k: sizes.
      halves: 2 where the output is gate and up, of which a block computes the same rows; else 1.
      blocks: of the kernel.
    """

    n: int
    k: int
    halves: int
    blocks: int

    @property
    def half_size(self) -> int:
        return self.n // self.halves

    @property
    def rows(self) -> int:
        """Rows of a half for each block; the last blocks may have fewer, or none."""
        return -(-self.half_size // (self.blocks * TILE)) * TILE

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return self.halves * self.rows // TILE

    @property
    def chunks(self) -> int:
        """Vectors of 128 rows that cover a block's rows of a half."""
        return -(-self.rows // HEAD_DIM)

    @property
    def k_slices(self) -> int:
        """K slices of a warpgroup; the last may lie beyond K, and is loaded as zeros."""
        return -(-self.k // (K_SLICE * WARPGROUPS))


@dataclasses.dataclass(frozen=True)
class LayersShape:
    """All that is static about the layers.

    Attributes:
      num_layers: of the model.
      hidden, ffn: sizes.
      heads, kv_heads: of HEAD_DIM numbers each.
      a_format, w_format: of all products.
      norm: "rms" or "layer".
      norm_eps: of the norms.
      activation: of the feed-forward block; if it is gated, the gate's rows come before up's.
      blocks: of the grid, at most one a multiprocessor.
      cache_bits: of the cache's codes, 8 or 4; or None for a cache of 16-bit floats.
      wait_limit_ms: milliseconds without progress in a block, after which the kernel traps.
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    a_format: BipolarFormat
    w_format: BipolarFormat
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Activation
    blocks: int
    cache_bits: int | None = None
    wait_limit_ms: int = WAIT_LIMIT_MS

    def __post_init__(self):
        if self.hidden % HEAD_DIM or self.ffn % HEAD_DIM:
            raise Unsupported(f"sizes must be multiples of {HEAD_DIM}, not {self.hidden} and {self.ffn}")
        if self.heads > self.blocks:
            raise Unsupported(f"{self.heads} heads are more than the {self.blocks} blocks")
        if self.w_slots < 2:
            raise Unsupported(f"tokens of {self.ffn} numbers leave no shared memory for weights")

    @functools.cached_property
    def products(self) -> dict[str, Product]:
        context, kv = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        halves = 2 if self.activation.gated else 1
        return {
            "qkv": Product(context + 2 * kv, self.hidden, 1, self.blocks),
            "o": Product(self.hidden, context, 1, self.blocks),
            "up": Product(halves * self.ffn, self.hidden, halves, self.blocks),
            "down": Product(self.hidden, self.ffn, 1, self.blocks),
        }

    def recovery(self, name: str) -> Recovery:
        return Recovery("planes", self.a_format, self.w_format, self.products[name].k, self.a_format.bits > 1)

    @property
    def splits(self) -> int:
        """Blocks among which a head's positions are split."""
        return min(self.blocks // self.heads, _MAX_SPLITS)

    @property
    def combined(self) -> int:
        """Elements of a head's context that each of its blocks combines: a power of two; the last blocks get none."""
        return max(TILE, HEAD_DIM >> (self.splits.bit_length() - 1))

    @property
    def cache_slots(self) -> int:
        """Chunks that a warpgroup has room for: one of keys and one of values, or one for both in turn.

        Floats beside wide weights leave room for one only.
        """
        return 2 if self.w_format.bits <= 2 or self.cache_bits is not None else 1

    @property
    def cache_row_bytes(self) -> int:
        """Of one position's key or value, without scale and zero."""
        return HEAD_DIM * (self.cache_bits or 16) // 8

    @property
    def max_k_slices(self) -> int:
        return max(product.k_slices for product in self.products.values())

    @property
    def max_rows(self) -> int:
        """Rows of all tiles of a block, padded so that a vector of 128 may start at any row of a half."""
        return max(product.tiles * TILE for product in self.products.values()) + HEAD_DIM

    @property
    def w_slots(self) -> int:
        """Slots of the weight ring; each holds a plane of a tile, a K slice for every warpgroup."""
        left = SHARED_MEMORY_BYTES - self._other_bytes - TILE * BYTES_PER_ROW
        return left // (WARPGROUPS * TILE * BYTES_PER_ROW)

    @property
    def _other_bytes(self) -> int:
        """Shared memory besides the weight ring; a position of a quantized cache has 6 more bytes, scale and zero."""
        tokens = WARPGROUPS * self.max_k_slices * 8 * BYTES_PER_ROW
        sums = 4 * WARPGROUPS * self.max_rows
        grid = 0 if self.cache_bits is None else 4 + 2
        cache = self.cache_slots * WARPGROUPS * CHUNK_POSITIONS * (self.cache_row_bytes + grid)
        context_sums = 4 * WARPGROUPS * WARPS * HEAD_DIM
        return tokens + sums + cache + context_sums + 2 * 1024

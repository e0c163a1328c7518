"""How the layers of a decode step are cut up: rows of the output over blocks, parts of K over warpgroups, memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, K_SLICE
from bipolar_jax.kernels.unsupported import Unsupported

WARPGROUPS = 4  # that compute; another one loads weights
TILE = 32  # columns of the output
POSITIONS = 64  # of the cache, in a chunk
HEAD_DIM = 128
PARTIAL = HEAD_DIM + TILE  # numbers that a block leaves of its head's attention
PRODUCTS = ("qkv", "o", "up", "down")
_MOST_SPLITS = 16  # whose results one thread puts together


@dataclasses.dataclass(frozen=True)
class Product:
    """One of a layer's four products, as blocks and warpgroups share it out.

    A block has the rows block * rows ... of each half of the output, in tiles of 32; its warpgroups take
    parts of K in turn.

    Attributes:
      n, k: sizes.
      halves: 2 where the output is gate and up, of which a block wants the same rows.
      blocks: of the kernel.
    """

    n: int
    k: int
    halves: int
    blocks: int

    @property
    def size(self) -> int:
        """Of a half of the output."""
        return self.n // self.halves

    @property
    def rows(self) -> int:
        """Of a half that a block has; the last blocks may have fewer, or none."""
        return -(-self.size // (self.blocks * TILE)) * TILE

    @property
    def tiles(self) -> int:
        """Of a block."""
        return self.halves * self.rows // TILE

    @property
    def chunks(self) -> int:
        """Vectors of 128 rows of a half."""
        return -(-self.rows // HEAD_DIM)

    @property
    def turns(self) -> int:
        """Parts of K that a warpgroup takes; the last may be beyond K, and come as zeros."""
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
      activation: in the feed-forward block: of the gate if it is gated, whose rows come before up's.
      blocks: one a multiprocessor.
      cache_bits: of the cache's codes, 8 or 4; or None where it has floats of 16 bits.
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
        """Blocks that share the positions of a head."""
        return min(self.blocks // self.heads, _MOST_SPLITS)

    @property
    def joined(self) -> int:
        """Of a head's numbers, those that one of these blocks puts together: a power of two; the last have none."""
        return max(TILE, HEAD_DIM >> (self.splits.bit_length() - 1))

    @property
    def cache_slots(self) -> int:
        """Chunks that a warpgroup has room for; where weights are many, floats of keys and values take turns in one."""
        return 2 if self.w_format.bits <= 2 or self.cache_bits is not None else 1

    @property
    def cache_row_bytes(self) -> int:
        """Of a vector in the cache, without its scale and zero."""
        return HEAD_DIM * (self.cache_bits or 16) // 8

    @property
    def most_turns(self) -> int:
        return max(product.turns for product in self.products.values())

    @property
    def most_rows(self) -> int:
        """Of all tiles of a block, filled up for vectors of 128 from any half's start."""
        return max(product.tiles * TILE for product in self.products.values()) + HEAD_DIM

    @property
    def w_slots(self) -> int:
        """Slots of the weights' ring: a plane of a tile, and a part of K for every warpgroup."""
        left = SHARED_MEMORY_BYTES - self._other_bytes - TILE * BYTES_PER_ROW
        return left // (WARPGROUPS * TILE * BYTES_PER_ROW)

    @property
    def _other_bytes(self) -> int:
        """Of shared memory besides the ring; where the cache has codes it has 6 bytes a vector for scales and zeros."""
        tokens = WARPGROUPS * self.most_turns * 8 * BYTES_PER_ROW
        sums = 4 * WARPGROUPS * self.most_rows
        grid = 0 if self.cache_bits is None else 4 + 2
        cache = self.cache_slots * WARPGROUPS * POSITIONS * (self.cache_row_bytes + grid)
        columns = 4 * WARPGROUPS * WARPS * HEAD_DIM
        return tokens + sums + cache + columns + 2 * 1024

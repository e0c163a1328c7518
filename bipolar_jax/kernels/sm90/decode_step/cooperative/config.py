"""How the layers are divided: rows of the output over blocks, K over warpgroups, shared memory over its uses."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.hadamard import LARGEST_WARP_BLOCK, Hadamard
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, SHARED_MEMORY_BYTES, WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.prepared_layout import PreparedLayout
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing.fields import MOST_BITS_BY_ROW, STAGE, TILE_ROWS, WORDS_PER_VECTOR

WARPGROUPS = 4  # that compute; a fifth loads weights
TILE = 32  # rows of the output (columns of the weights) in a tile
CHUNK_POSITIONS = 64  # of the cache, in a chunk
HEAD_DIMS = (64, 128)
SIZE_UNIT = 64  # of hidden and ffn: of parts that begin in a tile with that many rows, each has some
STAGES_PER_SLICE = K_SLICE // STAGE
RUN = TILE // 2  # elements that are neighbours in the order of parts, too
TEXT_SLICE_WORDS = K_SLICE // 4 + 4  # of one of several texts: a word of the next text is in another bank
PRODUCTS = ("qkv", "o", "up", "down")
HEAD_NORMS = ("queries", "keys")  # names of the norms of heads, beside those of products
MOST_TEXTS = 4  # whose tokens are in shared memory at the same time
PAIR = 2  # blocks of a cluster, which quantize the tokens of several texts for each other
_MOST_SLICES = 8  # of a token, that a warpgroup holds in registers
WAIT_LIMIT_MS = 2000  # a whole step takes some milliseconds
# Of shared memory. Barriers and alignment take 1.5 KB of the 4 KB that SHARED_MEMORY_BYTES leaves for them.
_AVAILABLE_BYTES = SHARED_MEMORY_BYTES + 2048
_MOST_BITS_OF_PAIRS = 6  # of prepared weights of which two warps of a warpgroup have a stage each in a load
_MAX_SPLITS = 16  # partial attentions that one thread combines


class Layers(NamedTuple):
    """The consecutive layers that a launch computes: `first` may be traced, `count` is static."""

    first: Any
    count: int


@dataclasses.dataclass(frozen=True)
class Product:
    """One of a layer's four products, divided over blocks and warpgroups.

    A block computes `rows` consecutive rows of each half of the output, in tiles of 32. Its warpgroups take K slices
    round-robin. A tile of prepared weights is a part: 16 rows of both halves where there are two. Where there is one,
    rows are counted in the order of parts (`vectors.row_of_parts`), up to the last whole tile: rows beyond N count, and
    are neither loaded nor stored.

    Attributes:
      n, k: sizes.
      halves: 2 where the output is gate and up, of which a block computes the same rows; else 1.
      blocks: of the kernel.
      prepared: whether weights are prepared.
    """

    n: int
    k: int
    halves: int
    blocks: int
    prepared: bool = False

    @property
    def half_size(self) -> int:
        return self.n // self.halves

    @property
    def rows(self) -> int:
        """Rows of a half for each block; the last blocks may have fewer, or none."""
        unit = TILE // self.halves if self.prepared else TILE
        return -(-self.counted_rows // (self.blocks * unit)) * unit

    @property
    def counted_rows(self) -> int:
        """Rows of a half as blocks count them."""
        return -(-self.half_size // TILE_ROWS) * TILE_ROWS if self.by_parts else self.half_size

    @property
    def by_parts(self) -> bool:
        """Whether rows are counted in the order of parts."""
        return self.prepared and self.halves == 1

    @property
    def ragged(self) -> bool:
        """Whether the last tile of parts has rows beyond N."""
        return self.counted_rows > self.half_size

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return self.halves * self.rows // TILE

    @property
    def chunks(self) -> int:
        """Vectors of 128 rows that cover a block's rows of a half."""
        return -(-self.rows // WARPGROUP)

    def keeps_whole(self, run: int) -> bool:
        """Whether every run of a half's elements is a vector's, and so a block's: a power of two that divides it."""
        return run <= (RUN if self.by_parts else WARPGROUP) and self.rows % run == 0

    @property
    def all_k_slices(self) -> int:
        """K slices of all warpgroups that do not lie beyond K."""
        return -(-self.k // K_SLICE)

    @property
    def k_slices(self) -> int:
        """K slices of a warpgroup; the last may lie beyond K, and is loaded as zeros."""
        return -(-self.k // (K_SLICE * WARPGROUPS))


def rotation_without_exchange(ffn: int, gated: bool, blocks: int = MULTIPROCESSORS) -> int:
    """The largest block of a rotation of down's input that always lies within a block of the grid; prepared weights."""
    halves = 2 if gated else 1
    up = Product(halves * ffn, ffn, halves, blocks, prepared=True)
    return max(1 << i for i in range(WARPGROUP.bit_length()) if ffn % (1 << i) == 0 and up.keeps_whole(1 << i))


@dataclasses.dataclass(frozen=True)
class LayersShape:
    """All that is static about the layers.

    Attributes:
      num_layers: of the weights.
      hidden, ffn: sizes.
      heads, kv_heads: of `head_dim` numbers each.
      head_dim: one of HEAD_DIMS.
      a_format, w_format: of all products; a_format is None with float tokens.
      norm: "rms" or "layer".
      norm_eps: of the norms.
      head_norm_eps: of the RMSNorm of each head of queries and keys; None if there is none.
      activation: of the feed-forward block; if it is gated, the gate's rows come before up's. Its rotation, of blocks
        within a warp, is that of the input of "down".
      blocks: of the grid, at most one a multiprocessor.
      texts: sequences, of which each has a new token.
      prepared: how weights are laid out; None for bit planes.
      float_token: "bf16" or "f16" if tokens are floats, which products of prepared weights multiply; else None.
      cache_bits: of the cache's codes, 8 or 4; or None for a cache of 16-bit floats.
      wait_limit_ms: milliseconds without progress in a block, after which the kernel traps.
      spans: of the tokens of each product, see `BipolarFormat.span`.
      first_layer: index in the cache of the first of these layers.
      key_rotation: of each head of queries and of cached keys, which are codes; None if there is none.
      shares_chunks: whether warpgroups attend for heads of their own with the same chunks of the cache, where they can.
      timed: whether warpgroups store readings of the clock, see `timeline`.
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    a_format: BipolarFormat | None
    w_format: BipolarFormat
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Activation
    blocks: int
    head_norm_eps: float | None = None
    texts: int = 1
    prepared: PreparedLayout | None = None
    float_token: str | None = None
    cache_bits: int | None = None
    wait_limit_ms: int = WAIT_LIMIT_MS
    spans: tuple[float, ...] = (1.0,) * len(PRODUCTS)
    first_layer: int = 0
    key_rotation: Hadamard | None = None
    shares_chunks: bool = True
    timed: bool = False

    def __post_init__(self):
        if self.head_dim not in HEAD_DIMS:
            raise Unsupported(f"heads must have {' or '.join(map(str, HEAD_DIMS))} numbers, not {self.head_dim}")
        if self.hidden % SIZE_UNIT or self.ffn % SIZE_UNIT:
            raise Unsupported(f"sizes must be multiples of {SIZE_UNIT}, not {self.hidden} and {self.ffn}")
        if self.texts > MOST_TEXTS:
            raise Unsupported(f"layers are one kernel for up to {MOST_TEXTS} texts, not for {self.texts}")
        if self.texts > 1 and (self.prepared is None or self.has_float_sums):
            raise Unsupported("layers of several texts are one kernel for prepared weights whose sums are integers")
        if self.units > self.blocks * self.heads_at_once:
            texts = "" if self.texts == 1 else f" of {self.texts} texts"
            raise Unsupported(f"{self.heads} heads{texts} are more than the {self.blocks} blocks")
        rotation = self.activation.rotation
        if rotation is not None and rotation.size != self.ffn:
            raise ValueError(f"the activation rotates {rotation.size} numbers, the input of down has {self.ffn}")
        if rotation is not None and not rotation.within_warp:
            raise Unsupported(
                f"the input of down is rotated in blocks of {rotation.block}: warps rotate powers of two up to "
                f"{LARGEST_WARP_BLOCK} without signs, as rotate(block=...) makes them"
            )
        keys = self.key_rotation
        if keys is not None and not (keys.within_warp and keys.block == self.head_dim and self.cache_bits):
            raise Unsupported("heads of queries and keys are rotated whole, without signs, for cached codes")
        if self.texts > 1 and max(map(self.slices_of_warpgroup, PRODUCTS)) > _MOST_SLICES:
            raise Unsupported(f"tokens of {self.ffn} numbers of {self.texts} texts do not fit in registers")
        if self.w_slots < 2:
            raise Unsupported(f"tokens of {self.ffn} numbers leave no shared memory for weights")

    @functools.cached_property
    def products(self) -> dict[str, Product]:
        context, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        halves = 2 if self.activation.gated else 1
        sizes = {
            "qkv": (context + 2 * kv, self.hidden, 1),
            "o": (self.hidden, context, 1),
            "up": (halves * self.ffn, self.hidden, halves),
            "down": (self.hidden, self.ffn, 1),
        }
        return {name: Product(*size, self.blocks, self.prepared is not None) for name, size in sizes.items()}

    @property
    def rotated_early(self) -> int:
        """Distance of the first stage of the rotation of down's input that the blocks that made it leave to all blocks.

        The rotation's block if they leave none; 1 if there is no rotation.
        """
        block = 1 if self.activation.rotation is None else self.activation.rotation.block
        while not self.products["up"].keeps_whole(block):
            block //= 2
        return block

    def token_format(self, name: str) -> BipolarFormat:
        """The grid of a product's tokens, which are not floats."""
        return dataclasses.replace(self.a_format, span=self.spans[PRODUCTS.index(name)])

    def recovery(self, name: str) -> Recovery:
        formats = (self.a_format, self.w_format, self.products[name].k, self.a_format.bits > 1)
        if self.prepared is None:
            return Recovery("planes", *formats)
        return ExpandedRecovery("int8", *formats, grouped=self.prepared.chunks > 0, unsigned=self.multiplies_bits)

    @property
    def scaled(self) -> bool:
        """Whether groups have float scales."""
        return self.prepared is not None and self.prepared.float_terms is not None

    @property
    def multiplies_bits(self) -> bool:
        """Whether prepared weights are multiplied as bits, with the bit planes of one token's codes."""
        prepared, bits = self.prepared, self.w_format.bits
        has_fields = prepared is not None and bits <= MOST_BITS_BY_ROW and prepared.order == "bytes"
        return has_fields and self.texts == 1 and not self.has_float_sums

    @property
    def has_float_sums(self) -> bool:
        """Whether sums are float32, each warp's for itself."""
        return self.scaled or self.float_token is not None

    @property
    def units(self) -> int:
        """Heads of all texts."""
        return self.heads * self.texts

    @property
    def columns(self) -> int:
        """Columns of a product that belong to different texts: their number, filled up to a power of two."""
        return 1 << (self.texts - 1).bit_length()

    @property
    def warpgroups_of_text(self) -> int:
        """That quantize a token together, see `teams`."""
        return WARPGROUPS // -(-self.texts // PAIR)

    def slices_of_warpgroup(self, name: str) -> int:
        """K slices of a product's token that a warpgroup quantizes; the last may lie beyond K."""
        return -(-self.products[name].all_k_slices // self.warpgroups_of_text)

    @property
    def heads_at_once(self) -> int:
        """Heads for which a block attends: one; or one a warpgroup, which share a head of keys and each chunk of it.

        The latter takes at least as many blocks for each such team of heads, so that they divide its context.
        """
        can_share = self.heads // self.kv_heads % WARPGROUPS == 0 and self.blocks >= self.units
        return WARPGROUPS if can_share and self.shares_chunks else 1

    @property
    def chunks_at_once(self) -> int:
        """Chunks of the cache that a block's warpgroups read at the same time: one each, or one that all share."""
        return WARPGROUPS // self.heads_at_once

    @property
    def every_warpgroup_finishes(self) -> bool:
        """Whether a phase ends with work of all warpgroups, or of the first alone."""
        return self.texts > 1 or self.heads_at_once > 1

    @property
    def splits(self) -> int:
        """Blocks among which a head's positions are split."""
        return min(self.blocks * self.heads_at_once // self.units, _MAX_SPLITS)

    @property
    def partial_size(self) -> int:
        """Floats of a block's partial attention."""
        return self.head_dim + TILE

    @property
    def combined(self) -> int:
        """Elements of its heads' context that a block combines: a power of two; the last blocks get none."""
        return max(TILE, self.heads_at_once * self.head_dim >> (self.splits.bit_length() - 1))

    @property
    def cache_slots(self) -> int:
        """Slots for each of `chunks_at_once`: one for keys and one for values, or one for both in turn.

        Floats beside wide weights, or several tokens, leave room for one only, unless warpgroups share it.
        """
        if self.heads_at_once > 1:
            return 2
        return 2 if (self.w_format.bits <= 2 and self.texts == 1) or self.cache_bits is not None else 1

    @property
    def cache_row_bytes(self) -> int:
        """Of one position's key or value, without scale and zero."""
        return self.head_dim * (self.cache_bits or 16) // 8

    @property
    def max_k_slices(self) -> int:
        return max(product.k_slices for product in self.products.values())

    @property
    def max_rows(self) -> int:
        """Rows of all tiles of a block, padded so that a vector of 128 may start at any row of a half."""
        products = self.products.values()
        if self.prepared is not None:  # every byte counts: the last vector starts with the last half's last chunk
            return max((product.halves - 1) * product.rows + product.chunks * WARPGROUP for product in products)
        return max(product.tiles * TILE for product in products) + WARPGROUP

    @property
    def w_slots(self) -> int:
        """Slots of the weight ring.

        Each holds a plane of a tile, a K slice for every warpgroup; or `stages_per_load` stages of a part for each.
        """
        left = _AVAILABLE_BYTES - self._other_bytes
        if self.prepared is None:
            return (left - TILE * BYTES_PER_ROW) // (WARPGROUPS * TILE * BYTES_PER_ROW)
        return left // (self.stages_per_load * self._stage_bytes)

    @property
    def _stage_bytes(self) -> int:
        """Of a stage of prepared weights for every warpgroup."""
        stage_words = self.w_format.bits * WORDS_PER_VECTOR + math.prod(self.prepared.terms_shape)
        return WARPGROUPS * 4 * stage_words

    @property
    def stages_per_load(self) -> int:
        """Stages of a part that a warpgroup gets with a load: two or one for each warp, or one for two or four in turn.

        Two of few bits, where four such slots have room: a whole K slice, those of all warpgroups in one copy. Half
        where four stages would leave room for two slots: beside many bits, float scales of short groups, or the tokens
        of several texts. Fields of 7 and 8 bits take few instructions: loads of 16 KB, as of planes, are multiplied
        while the next ones arrive, and their slots are free again sooner.
        """
        plain = self.texts == 1 and not self.has_float_sums
        slice_bytes = STAGES_PER_SLICE * self._stage_bytes
        if plain and self.w_format.bits <= 2 and _AVAILABLE_BYTES - self._other_bytes >= 4 * slice_bytes:
            return STAGES_PER_SLICE
        if plain and self.w_format.bits > _MOST_BITS_OF_PAIRS:
            return 1
        wide = self.w_format.bits > 4 or (self.scaled and self.prepared.chunks > 1)
        if self.texts > 1:
            wide = _AVAILABLE_BYTES - self._other_bytes < 3 * WARPS * self._stage_bytes
        return WARPS // 2 if wide else WARPS

    @property
    def token_slices(self) -> int:
        """K slices of the longest token."""
        return max(product.all_k_slices for product in self.products.values())

    @property
    def _other_bytes(self) -> int:
        """Shared memory besides the weight ring; 4 + 2 bytes are the scale and zero of a cached position."""
        tokens, reductions = WARPGROUPS * self.max_k_slices * 8 * BYTES_PER_ROW, 2 * 1024
        if self.prepared is not None:
            tokens, reductions = self.token_slices * K_SLICE * (1 if self.float_token is None else 2), 1024
        if self.texts > 1:
            tokens, reductions = self.texts * self.token_slices * 4 * TEXT_SLICE_WORDS, 2 * 1024
        sums = 4 * WARPGROUPS * self.max_rows * (WARPS if self.has_float_sums else self.texts)
        position_bytes = self.cache_row_bytes + (0 if self.cache_bits is None else 4 + 2)
        cache = self.cache_slots * self.chunks_at_once * CHUNK_POSITIONS * position_bytes
        return tokens + sums + cache + 4 * WARPGROUPS * WARPS * WARPGROUP + reductions

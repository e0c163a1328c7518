"""Static description of the weight-only product: its shape, and how a block divides its tiles."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS, FloatType
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, K_SLICE
from bipolar_jax.kernels.unsupported import Unsupported

CHUNK = 128  # elements of K that a warp takes at a time: a word for each of four lanes
TILE_ROWS = 16  # rows of the warp's instruction
_MOST_TOKENS = 32
_BARRIER_BYTES = 1024
_MOST_SLOTS = 8  # four warpgroups then have the 32 barriers that Mosaic allows in a group


@dataclasses.dataclass(frozen=True)
class WeightOnlyTiling:
    """How a block divides its tiles among warpgroups.

    Attributes:
      rows: rows of weights in a tile, a multiple of 16.
      warpgroups: they take slices of K in turn.
      slots: stages of each warpgroup's ring buffer; a stage holds one slice of a tile, all planes.
      buffers: tiles whose sums shared memory holds at a time; the first `buffers` warpgroups finish tiles in turn.
    """

    rows: int
    warpgroups: int
    slots: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class WeightOnlyShape:
    """The static shape of a product.

    Attributes:
      m: tokens.
      n: columns of the output.
      k: contracted size, a multiple of CHUNK.
      w_format: format of the weights.
      group_size: elements of K that share a scale: 32, 64 or a multiple of 128; None for all.
      groups: number of groups in a row of weights.
      offset: whether weights have offsets.
      dtype: of activations and output, bfloat16 or float16.
      tiling: of a block.
    """

    m: int
    n: int
    k: int
    w_format: BipolarFormat
    group_size: int | None
    groups: int
    offset: bool
    dtype: jnp.dtype
    tiling: WeightOnlyTiling

    @property
    def float_type(self) -> FloatType:
        """The type of the instruction's operands: that of the activations."""
        return FLOATS[PTX_TYPES[jnp.dtype(self.dtype).name]]

    @property
    def width(self) -> int:
        """Columns of the sums: the tokens, filled up to a legal width."""
        return token_width(self.m)

    @property
    def row_tiles(self) -> int:
        """Instructions that cover the rows of a tile."""
        return self.tiling.rows // TILE_ROWS

    @property
    def sums_rows(self) -> int:
        """Rows of a warpgroup's partial sums: one per warp and row of the tile."""
        return self.tiling.rows * WARPS

    @property
    def groups_per_chunk(self) -> int:
        """Groups that share a chunk; 1 if a group has at least one chunk."""
        return _groups_per_chunk(self.group_size)

    @property
    def tiles(self) -> int:
        return -(-self.n // self.tiling.rows)


def token_width(m: int) -> int:
    """Columns of the sums for m tokens: 8, 16 or 32."""
    return max(8, 1 << (m - 1).bit_length())


def check_dtype(dtype: jnp.dtype) -> None:
    """Raises Unsupported unless activations are bfloat16 or float16."""
    if PTX_TYPES.get(jnp.dtype(dtype).name) not in FLOATS:
        raise Unsupported(
            f"float activations must be bfloat16 or float16 for the tensor cores to multiply exactly, not {dtype}"
        )


def check_groups(group_size: int | None) -> None:
    """Raises Unsupported for groups that neither divide a warp's chunk of K nor are multiples of it."""
    if group_size not in (None, 32, 64) and group_size % CHUNK:
        raise Unsupported(
            f"groups under float activations must have 32, 64 or a multiple of {CHUNK} elements, not {group_size}"
        )


def most_tokens(group_size: int | None) -> int:
    """Tokens of one product: fewer where groups share a chunk, as each has its own copy of the tokens in registers."""
    return _MOST_TOKENS // _groups_per_chunk(group_size)


def _groups_per_chunk(group_size: int | None) -> int:
    return 1 if group_size is None else max(1, CHUNK // group_size)


def weight_only_tiling(m: int, k: int, w_bits: int, group_size: int | None = None) -> WeightOnlyTiling:
    """As many warpgroups as have work, and enough registers and shared memory for all planes of a slice.

    With few tokens tiles have few rows, so that there are enough tiles for all multiprocessors. With 16 columns a
    tile's tokens are more bytes than its weights: then more rows share the tokens, if two slots fit.

    Args:
      m: tokens, up to `most_tokens`.
      k: contracted size.
      w_bits: planes of the weights.
      group_size: elements of K that share a scale, or None.

    Raises:
      ValueError: more tokens.
    """
    if not 1 <= m <= most_tokens(group_size):
        raise ValueError(f"m must be from 1 to {most_tokens(group_size)}, got {m}: multiply fewer tokens at a time")
    width = token_width(m)
    buffers = 2 if width == 8 else 1
    # 512 threads have 128 registers each, 384 have 168 and 256 have 255.
    columns = width * _groups_per_chunk(group_size)  # in a warp's registers
    most = 2 if columns >= 32 else 3 if columns == 16 else 4
    most = min(most, -(-k // K_SLICE))
    for rows in (64, 32) if width == 16 else (32,):
        for warpgroups in range(most, min(most, 2) - 1, -1):
            sums = min(buffers, warpgroups) * warpgroups * rows * WARPS * width * 4
            left = SHARED_MEMORY_BYTES - _BARRIER_BYTES - sums
            slots = min(_MOST_SLOTS, left // (warpgroups * w_bits * rows * BYTES_PER_ROW))
            if slots >= 2:
                return WeightOnlyTiling(rows, warpgroups, slots, min(buffers, warpgroups))
    raise AssertionError(f"{w_bits} planes leave no shared memory")

"""The static side of a product of float activations with packed weights: sizes, and how a block shares them out."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.weight_only.unpack import BF16, F16, Number
from bipolar_jax.kernels.unsupported import Unsupported

PART = 1024  # elements of K that are loaded at a time: of each plane 128 bytes a row
CHUNK = 128  # elements of K that a warp takes at a time: a word for each of four lanes
_MOST_TOKENS = 32
WARPS = 4  # of a warpgroup
TILE_ROWS = 16  # of the warp's instruction
_TERMS_BYTES = 1024  # barriers
_MOST_SLOTS = 8  # barriers of four warpgroups: Mosaic has up to 32 in a group
_NUMBERS = {jnp.dtype(jnp.bfloat16): BF16, jnp.dtype(jnp.float16): F16}


@dataclasses.dataclass(frozen=True)
class WeightOnlyTiling:
    """How a block shares out its tiles.

    Attributes:
      rows: of weights in a tile, a multiple of 16.
      warpgroups: that take parts of K in turn.
      slots: parts of a tile, all planes, that each warpgroup has in shared memory or on their way.
      buffers: tiles whose sums may wait in shared memory; as many warpgroups finish tiles.
    """

    rows: int
    warpgroups: int
    slots: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class WeightOnlyShape:
    """What the threads of a kernel agree on.

    Attributes:
      m: tokens.
      n: columns of the output.
      k: contracted size, a multiple of CHUNK.
      w_format: of the weights.
      group_size: elements of K that share a scale: 32, 64 or a multiple of 128; None for all.
      groups: how many.
      offset: whether weights have offsets.
      dtype: of activations and output.
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
    def number(self) -> Number:
        return _NUMBERS[jnp.dtype(self.dtype)]

    @property
    def width(self) -> int:
        """Columns of the sums: the tokens filled up."""
        return token_width(self.m)

    @property
    def row_tiles(self) -> int:
        """Instructions' rows in a tile."""
        return self.tiling.rows // TILE_ROWS

    @property
    def sums_rows(self) -> int:
        """Rows of a warpgroup's sums: each of its warps has sums of its own of every row of the tile."""
        return self.tiling.rows * WARPS

    @property
    def splits(self) -> int:
        """Groups that share a chunk."""
        return _splits(self.group_size)

    @property
    def tiles(self) -> int:
        return -(-self.n // self.tiling.rows)


def token_width(m: int) -> int:
    """8, 16 or 32."""
    return max(8, 1 << (m - 1).bit_length())


def check_dtype(dtype: jnp.dtype) -> None:
    """Raises Unsupported unless activations are bfloat16 or float16."""
    if jnp.dtype(dtype) not in _NUMBERS:
        raise Unsupported(
            f"float activations must be bfloat16 or float16 for the tensor cores to multiply exactly, not {dtype}"
        )


def check_groups(group_size: int | None) -> None:
    """Raises Unsupported for groups that do not fit a warp's part of K."""
    if group_size not in (None, 32, 64) and group_size % CHUNK:
        raise Unsupported(
            f"groups under float activations must have 32, 64 or a multiple of {CHUNK} elements, not {group_size}"
        )


def most_tokens(group_size: int | None) -> int:
    """Tokens that are multiplied at a time: fewer where groups share a chunk, each with the tokens in registers."""
    return _MOST_TOKENS // _splits(group_size)


def _splits(group_size: int | None) -> int:
    return 1 if group_size is None else max(1, CHUNK // group_size)


def weight_only_tiling(m: int, k: int, w_bits: int, group_size: int | None = None) -> WeightOnlyTiling:
    """As many warpgroups as have work, and registers and shared memory enough for all planes of a part.

    Tiles of few tokens have few rows, so that there are enough of them for all multiprocessors; where the
    tokens' numbers are more bytes than the weights', more rows share them if two slots fit.

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
    columns = width * _splits(group_size)  # that a warp has in registers
    most = 2 if columns >= 32 else 3 if columns == 16 else 4
    most = min(most, -(-k // PART))
    for rows in (64, 32) if width == 16 else (32,):
        for warpgroups in range(most, min(most, 2) - 1, -1):
            sums = min(buffers, warpgroups) * warpgroups * rows * WARPS * width * 4
            left = SHARED_MEMORY_BYTES - _TERMS_BYTES - sums
            slots = min(_MOST_SLOTS, left // (warpgroups * w_bits * rows * BYTES_PER_ROW))
            if slots >= 2:
                return WeightOnlyTiling(rows, warpgroups, slots, min(buffers, warpgroups))
    raise AssertionError(f"{w_bits} planes leave no shared memory")

"""Float scales of groups, laid out in the order in which threads read them beside the fields of `packing.fields`.

A number is S * (u + Z) + o, with u the code, S twice the scale of a value, and Z = -W / 2 where the codes themselves
have no other zero. A row's terms are stored for every chunk of K in which no group ends, gcd(group_size, STAGE)
elements, in one of these forms:

- "scales": S as float32. Without offsets; Z is -W / 2.
- "zeros": S and Z as float16. Where both are exact: S is a float16, every offset a multiple of half of S, as in GPTQ,
  AWQ, and GGUF's Q4_0 and Q8_0; o is 0.
- "minimums": S and the number of code 0 as float16, o is that + S * W / 2. Where both are exact: GGUF's Q4_1 and Q5_1.
- "offsets": S and o as float32, for all others; Z is -W / 2. A power of two is in the column's scale, so that S * W / 2
  and o are below 1, and numbers fit a float16.

A chunk of a part has one vector of 32 words, or two: words 4 r + 2 b + p belong to row 16 b + 8 p + r of the part, so
that the lanes 4 r to 4 r + 3 load the terms of their four rows at once.

GGUF's K types have integers of chunks below float16 numbers of blocks of 256 elements, and so have their terms, of a
stage in one vector: first the block's numbers, for every stage, then the integers. Codes are those of the file, S may
be negative, and every product is exact in float32:

- "block_scales": S = d i, i from -128 to 127; Z is -(W + 1) / 2 and o is 0. Q3_K, Q6_K. 16 words of d, word 2 r + b of
  the pair p; then 8 words of i + 128 a chunk, whose word r has row (b, p) in byte 2 b + p.
- "block_minimums": S = d i, and the number of code 0 is d' j, i and j from 0 to 63; Z and o are those of "minimums".
  Q4_K, Q5_K. 32 words of d and d' in the order of a vector; then 24 words every two chunks: 8 of each chunk's
  i + 64 (j mod 4), ordered as i above, and 8 with j / 4 of both, the first in the low half of each byte.
- "block_nibbles": the same with i and j from 0 to 15. Q2_K. 32 words of d and d'; then 8 words of i + 16 j a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers
from bipolar_jax.packing.fields import CHUNK_WORDS, PART_ROWS, PARTS, STAGE

BlockTerms = Literal["block_scales", "block_minimums", "block_nibbles"]
FloatTerms = Literal["scales", "zeros", "minimums", "offsets"] | BlockTerms
BLOCK_TERMS: tuple[BlockTerms, ...] = get_args(BlockTerms)
ROW_WORDS = PART_ROWS // 4  # of a byte for each row of a part
# Multiples of 1/2 up to this are exact in float16, and so are their products with a float16 in float32.
_LARGEST_ZERO = 1024
_BYTE_BIAS = 128  # of "block_scales"
_LOW_BITS = 2  # of the minimums of "block_minimums" that lie beside a scale


def terms_shape(kind: FloatTerms | None, chunks: int) -> tuple[int, int]:
    """Vectors of the terms of a stage and part of so many chunks, and words of each; None is integer groups."""
    if kind in BLOCK_TERMS:
        return 1, block_words(kind) + _integer_words(kind, chunks)
    return chunks, CHUNK_WORDS if kind is None else PART_ROWS * _vectors_of(kind)


def term_words(kind: FloatTerms | None, chunks: int) -> int:
    """Words of the terms of a stage and part."""
    return math.prod(terms_shape(kind, chunks))


def block_words(kind: BlockTerms) -> int:
    """Words of a block's float16 numbers, before the integers of chunks."""
    return PART_ROWS // 2 if kind == "block_scales" else PART_ROWS


def _integer_words(kind: BlockTerms, chunks: int) -> int:
    return ROW_WORDS * (chunks + chunks // 2 if kind == "block_minimums" else chunks)


def _vectors_of(kind: FloatTerms) -> int:
    return 2 if kind == "offsets" else 1


def narrowest_terms(
    scale: Float[Array, "*batch n groups"], offset: Float[Array, "*batch n groups"] | None, fmt: BipolarFormat
) -> FloatTerms:
    """The smallest form that is exact; "offsets" of traced arrays that have offsets."""
    if offset is None:
        return "scales"
    if isinstance(scale, jax.core.Tracer) or isinstance(offset, jax.core.Tracer):
        return "offsets"
    if bool(_has_zeros(scale, offset, fmt)):
        return "zeros"
    return "minimums" if bool(_has_minimums(scale, offset, fmt)) else "offsets"


def shared_terms(arrays: list[BipolarNumbers]) -> FloatTerms:
    """The smallest form that is exact for all these arrays with float scales of groups, of one format."""
    kinds = {narrowest_terms(w.scale, w.offset, w.format) for w in arrays}
    if len(kinds) > 1:
        offsets = [0 * w.scale if w.offset is None else w.offset for w in arrays]
        kinds = {narrowest_terms(w.scale, offset, w.format) for w, offset in zip(arrays, offsets, strict=True)}
    return "offsets" if len(kinds) > 1 else kinds.pop()


@functools.partial(jax.jit, static_argnums=2)
def _has_zeros(scale: Array, offset: Array, fmt: BipolarFormat) -> Array:
    scale = 2 * scale
    zero = _zeros(scale, offset, fmt)
    exact = (scale == scale.astype(jnp.float16).astype(jnp.float32)) & (jnp.abs(zero) <= _LARGEST_ZERO)
    return jnp.all(exact & (scale * (zero + fmt.max_value / 2) == offset))


@functools.partial(jax.jit, static_argnums=2)
def _has_minimums(scale: Array, offset: Array, fmt: BipolarFormat) -> Array:
    scale = 2 * scale
    minimum = (offset - scale * (fmt.max_value / 2)).astype(jnp.float16).astype(jnp.float32)
    exact = scale == scale.astype(jnp.float16).astype(jnp.float32)
    return jnp.all(exact & (minimum + scale * (fmt.max_value / 2) == offset))


def _zeros(scale: Array, offset: Array, fmt: BipolarFormat) -> Array:
    """Z of S and o: the nearest multiple of 1/2."""
    ratio = jnp.where(scale == 0, 0, offset / jnp.where(scale == 0, 1, scale))
    return jnp.round(2 * (ratio - fmt.max_value / 2)) / 2


def pack_float_terms(
    scale: Float[Array, "rows groups"],
    offset: Float[Array, "rows groups"] | None,
    fmt: BipolarFormat,
    kind: FloatTerms,
    group_size: int,
    stages: int,
) -> UInt32[Array, "tiles parts stages chunks words"]:
    """Words of the terms of every chunk; rows are filled up to whole tiles.

    Args:
      scale, offset: of values, as `BipolarArray` has them.
      fmt: of the codes.
      kind: the form, see `narrowest_terms`.
      group_size: elements of K.
      stages: of K.
    """
    scale = 2 * scale
    if kind == "scales":
        vectors = [_as_words(scale)]
    elif kind in ("zeros", "minimums"):
        offset = jnp.zeros_like(scale) if offset is None else offset
        second = _zeros(scale, offset, fmt) if kind == "zeros" else offset - scale * (fmt.max_value / 2)
        pairs = jnp.stack([scale, second], axis=-1).astype(jnp.float16)
        vectors = [jax.lax.bitcast_convert_type(pairs, jnp.uint32)]
    else:
        vectors = [_as_words(scale), _as_words(jnp.zeros_like(scale) if offset is None else offset)]
    chunk = math.gcd(group_size, STAGE)
    chunks = STAGE // chunk
    group = np.minimum(np.arange(stages * chunks) * chunk // group_size, scale.shape[1] - 1)
    words = jnp.stack([words[:, group] for words in vectors])
    # Vector, tile, block, part, half of the part's rows, lane / 4, stage, chunk.
    words = words.reshape(len(vectors), -1, 2, PARTS, 2, 8, stages, chunks).transpose(1, 3, 6, 7, 0, 5, 2, 4)
    return words.reshape(-1, PARTS, stages, *terms_shape(kind, chunks))


def pack_block_terms(
    scale: Float[Array, "rows blocks"],
    minimum: Float[Array, "rows blocks"] | None,
    scales: Integer[Array, "rows groups"],
    minimums: Integer[Array, "rows groups"] | None,
    kind: BlockTerms,
    sizes: tuple[int, int],
    stages: int,
) -> UInt32[Array, "tiles parts stages 1 words"]:
    """Words of the terms of stages in which blocks have float16 numbers and groups integers, of whole tiles.

    Args:
      scale, minimum, scales, minimums: as `BlockScaledArray` has them.
      kind: the form.
      sizes: elements of K of a block, a multiple of a stage, and of a group, of which two or more make a stage.
      stages: of K.
    """
    block_size, group_size = sizes
    chunks = STAGE // group_size
    block = np.minimum(np.arange(stages) * STAGE // block_size, scale.shape[1] - 1)
    group = np.minimum(np.arange(stages * chunks), scales.shape[1] - 1)

    def in_lanes(rows: Array) -> Array:
        # Tile, block, part, half of the part's rows, lane / 4, stage, chunk.
        rows = rows.reshape(-1, 2, PARTS, 2, 8, stages, rows.shape[1] // stages)
        return rows.transpose(0, 2, 5, 6, 4, 1, 3)

    def as_words(numbers: Array, count: int) -> Array:
        """Words of `count` neighbours, [tiles, parts, stages, words]."""
        grouped = numbers.reshape(*numbers.shape[:3], -1, count)
        return jax.lax.bitcast_convert_type(grouped, jnp.uint32)

    scale = in_lanes(scale[:, block].astype(jnp.float16))
    bytes_of_groups = in_lanes(scales[:, group])
    if kind == "block_scales":
        biased = (bytes_of_groups.astype(jnp.int16) + _BYTE_BIAS).astype(jnp.uint8)
        words = [as_words(scale, 2), as_words(biased, 4)]
    else:
        pairs = jnp.stack([scale, in_lanes(minimum[:, block].astype(jnp.float16))], axis=-1)
        integers = bytes_of_groups.astype(jnp.uint8)
        if kind == "block_minimums":
            lows, highs = (in_lanes(minimums[:, group]).astype(jnp.uint8) >> shift for shift in (0, _LOW_BITS))
            low = (lows & ((1 << _LOW_BITS) - 1)) << (8 - _LOW_BITS)
            by_pair = (integers | low).reshape(*integers.shape[:3], chunks // 2, 2, 8, 2, 2)
            highs = highs.reshape(by_pair.shape)
            highs = highs[:, :, :, :, :1] | (highs[:, :, :, :, 1:] << 4)
            integers = jnp.concatenate([by_pair, highs], axis=4)
        words = [as_words(pairs, 2), as_words(integers, 4)]
    return jnp.concatenate(words, axis=-1)[:, :, :, None]


def _part_block_terms(
    terms: UInt32[Array, "*batch 1 words"], kind: BlockTerms
) -> tuple[Float[Array, "*batch part_rows chunks"], Float[Array, "*batch part_rows chunks"] | None]:
    """S, and the number of code 0, None of "block_scales"."""
    words, head = terms[..., 0, :], block_words(kind)
    *batch, _ = words.shape

    def in_rows(numbers: Array) -> Array:
        """Of [*batch, chunks, lane / 4, block, half of the rows], float32 [*batch, part_rows, chunks]."""
        axes = [len(batch) + axis for axis in (2, 3, 1, 0)]
        numbers = numbers.astype(jnp.float32).transpose(*range(len(batch)), *axes)
        return numbers.reshape(*batch, PART_ROWS, -1)

    halves = jax.lax.bitcast_convert_type(words[..., :head], jnp.float16)
    integers = jax.lax.bitcast_convert_type(words[..., head:], jnp.uint8)
    if kind == "block_scales":
        scale = in_rows(halves.reshape(*batch, 1, 8, 2, 2))
        return scale * (in_rows(integers.reshape(*batch, -1, 8, 2, 2)) - _BYTE_BIAS), None
    scale, minimum = (in_rows(halves[..., i].reshape(*batch, 1, 8, 2, 2)) for i in range(2))
    if kind == "block_nibbles":
        integers = integers.reshape(*batch, -1, 8, 2, 2)
        scales, minimums = integers & 15, integers >> 4
    else:
        integers = integers.reshape(*batch, -1, 3, 8, 2, 2)
        by_pair, highs = integers[..., :2, :, :, :], integers[..., 2:, :, :, :]
        scales = by_pair & ((1 << 8 - _LOW_BITS) - 1)
        minimums = jnp.concatenate([highs & 15, highs >> 4], axis=-4) << _LOW_BITS | by_pair >> (8 - _LOW_BITS)
        scales, minimums = (numbers.reshape(*batch, -1, 8, 2, 2) for numbers in (scales, minimums))
    return scale * in_rows(scales), minimum * in_rows(minimums)


def part_float_terms(
    terms: UInt32[Array, "*batch vectors words"], fmt: BipolarFormat, kind: FloatTerms
) -> tuple[Float[Array, "*batch part_rows chunks"], Float[Array, "*batch part_rows chunks"], Array | None]:
    """S, Z and o of parts of a stage, float32, o None where it is 0: row 16 b + 8 p + r."""
    if kind not in BLOCK_TERMS:
        return tuple(None if term is None else _rows_of_lanes(term) for term in lane_float_terms(terms, fmt, kind))
    scale, number = _part_block_terms(terms, kind)
    if number is None:
        return scale, jnp.full_like(scale, -(fmt.max_value + 1) / 2), None
    return scale, jnp.full_like(scale, -fmt.max_value / 2), number + scale * (fmt.max_value / 2)


def lane_float_terms(
    terms: UInt32[Array, "*batch vectors words"], fmt: BipolarFormat, kind: FloatTerms
) -> tuple[Float[Array, "*batch chunks part_rows"], Float[Array, "*batch chunks part_rows"], Array | None]:
    """S, Z and o as `part_float_terms` has them, in the order of the words: 4 r + 2 b + p."""
    if kind in BLOCK_TERMS:
        scale, zero, offset = part_float_terms(terms, fmt, kind)
        return _lanes_of_rows(scale), _lanes_of_rows(zero), None if offset is None else _lanes_of_rows(offset)
    words = terms.reshape(*terms.shape[:-1], _vectors_of(kind), PART_ROWS)
    first = words[..., 0, :]
    if kind in ("zeros", "minimums"):
        pair = jax.lax.bitcast_convert_type(first, jnp.float16).astype(jnp.float32)
        scale, second = pair[..., 0], pair[..., 1]
        if kind == "zeros":
            return scale, second, None
        return scale, jnp.full_like(scale, -fmt.max_value / 2), second + scale * (fmt.max_value / 2)
    scale = jax.lax.bitcast_convert_type(first, jnp.float32)
    zero = jnp.full(scale.shape, -fmt.max_value / 2, jnp.float32)
    return scale, zero, jax.lax.bitcast_convert_type(words[..., 1, :], jnp.float32) if kind == "offsets" else None


def pack_lane_offsets(
    scale: Float[Array, "*batch chunks part_rows"], offset: Float[Array, "*batch chunks part_rows"]
) -> UInt32[Array, "*batch chunks words"]:
    """Terms of the form "offsets", from S and o in the order of the words: the inverse of `lane_float_terms`."""
    return _as_words(jnp.concatenate([scale, offset], axis=-1))


def _rows_of_lanes(numbers: Float[Array, "*batch chunks part_rows"]) -> Float[Array, "*batch part_rows chunks"]:
    *batch, chunks, _ = numbers.shape
    axes = [len(batch) + axis for axis in (2, 3, 1, 0)]
    numbers = numbers.reshape(*batch, chunks, 8, 2, 2)  # lane / 4, block, half of the rows
    return numbers.transpose(*range(len(batch)), *axes).reshape(*batch, PART_ROWS, chunks)


def _lanes_of_rows(numbers: Float[Array, "*batch part_rows chunks"]) -> Float[Array, "*batch chunks part_rows"]:
    *batch, _, chunks = numbers.shape
    axes = [len(batch) + axis for axis in (3, 2, 0, 1)]
    numbers = numbers.reshape(*batch, 2, 2, 8, chunks)  # block, half of the rows, lane / 4
    return numbers.transpose(*range(len(batch)), *axes).reshape(*batch, chunks, PART_ROWS)


def unpack_float_terms(
    terms: UInt32[Array, "tiles parts stages vectors words"],
    fmt: BipolarFormat,
    kind: FloatTerms,
    group_size: int,
    k: int,
) -> tuple[Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """Scales and offsets of values of whole tiles, 0 for no offset: the inverse of packing, steps below zero too."""
    scale, zero, offset = part_float_terms(terms, fmt, kind)
    tiles, _, stages, _, chunks = scale.shape
    group_starts = np.arange(-(-k // group_size)) * group_size // (STAGE // chunks)

    def of_rows(part: Array) -> Array:
        rows = part.reshape(tiles, PARTS, stages, 2, PART_ROWS // 2, chunks).transpose(0, 3, 1, 4, 2, 5)
        return rows.reshape(tiles * STAGE, stages * chunks)[:, group_starts]

    offset = scale * (zero + fmt.max_value / 2) if offset is None else offset
    return of_rows(scale / 2), of_rows(offset)


def _as_words(numbers: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.uint32)

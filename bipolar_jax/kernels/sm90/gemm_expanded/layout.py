"""Weights laid out in the order in which threads expand them.

A tile is TILE_ROWS rows of weights times a stage of K, STAGE elements. A warpgroup multiplies it in STEPS steps of 32
elements, each with an instruction for either block of 64 rows. In one step a thread holds eight registers of A, four
bytes each: register 4 b + 2 h + p of lane 4 r + t of warp w, in byte i, is

    row 64 b + 16 w + 8 p + r,  position 32 step + 16 h + 4 t + i of the stage

(PTX ISA, the fragment of A of wgmma m64nNk32). Codes are split into fields of 8, 4, 2 and 1 bits whose widths add up to
theirs: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. A word of fields of f bits has the codes of 8 / f registers, those of one
register f bits apart from those of the next, so that a shift and a mask make a register of it. A thread's words of a
stage are `bits` vectors of four, each next to those of its neighbours: loads of 16 bytes without bank conflicts.

A byte's position in the stage follows the tokens' bytes. Those of `quantize_rows` interleave each 32 elements, see
`arithmetic.operands`; groups that are no multiple of 32 need them in their natural order, or a register would have
bytes of two groups.

A group's scale s and offset o (`quantize.integer_groups`) are the bytes s and o + 128, for every chunk of K in which no
group ends: gcd(group_size, STAGE) elements. The pairs of rows r and r + 8 share a word, and a thread's words of both
blocks are neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.packing.words import pack_codes, unpack_codes
from bipolar_jax.quantize.integer_groups import MOST_BITS, SMALLEST_VALUE

TILE_ROWS = STAGE = 128
STEPS = 4
VECTOR = 4  # words that a thread loads at once
WORDS_PER_VECTOR = WARPGROUP * VECTOR
REGISTERS = 8  # of A, in one step
CHUNK_WORDS = TILE_ROWS // 2  # of the terms of one chunk
GROUP_UNIT = 16  # elements: half of a step, which is as far as a register reaches
OFFSET_BIAS = -SMALLEST_VALUE  # makes s * u + o an unsigned byte

_FIELD_WIDTHS = (8, 4, 2, 1)


def fields_of(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of the fields that a code is split into, in the order in which they are stored."""
    fields, shift = [], 0
    for width in _FIELD_WIDTHS:
        if bits & width:
            fields.append((width, shift))
            shift += width
    return fields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedWeights:
    """Codes of weights [n, k] in the layout of this module; leaves may have leading batch axes.

    Always: codes of rows and elements beyond n and k are 0; s and o + 128 of rows beyond n are 0.

    Attributes:
      words: the codes' fields, uint32 [tiles, stages, bits, WORDS_PER_VECTOR].
      terms: the groups' byte pairs, uint32 [tiles, stages, chunks, CHUNK_WORDS]; None without groups.
      n, k: true sizes.
      natural_order: whether the tokens' bytes must be in their natural order.
    """

    words: UInt32[Array, "*batch tiles stages bits vector_words"]
    terms: UInt32[Array, "*batch tiles stages chunks chunk_words"] | None
    n: int = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    natural_order: bool = dataclasses.field(metadata={"static": True})

    @property
    def bits(self) -> int:
        return self.words.shape[-2]

    @property
    def chunks(self) -> int:
        """Chunks of a stage that have terms of their own; 0 without groups."""
        return 0 if self.terms is None else self.terms.shape[-2]


@functools.partial(jax.jit, static_argnames=("number_format", "k", "group_size", "gated"))
def prepare(
    planes: UInt32[Array, "planes n words"],
    number_format: BipolarFormat,
    k: int,
    *,
    group_size: int | None = None,
    group_scale: UInt8[Array, "n groups"] | None = None,
    group_offset: Int8[Array, "n groups"] | None = None,
    gated: bool = False,
) -> PreparedWeights:
    """Bit planes, as `packing.words` has them, in the layout of this module.

    Args:
      planes: of the codes.
      number_format: of 1 to 8 bits or ternary; with groups, of at most MOST_BITS bits.
      k: elements of K; the bits beyond are ignored.
      group_size: elements of K that share s and o, a multiple of GROUP_UNIT; None without groups.
      group_scale, group_offset: s and o of each group, with -128 <= s * u + o <= 127 for every code u; the last group
        may be shorter than the others.
      gated: whether the rows are gates followed by as many values. Then a tile has 64 gates and their values.

    Raises:
      ValueError: groups that this layout does not have, or terms of another shape.
    """
    n = planes.shape[1]
    codes = unpack_codes(planes, number_format, k)
    if group_size is None:
        return PreparedWeights(pack_fields(_rows_in_tiles(codes, gated), number_format.bits, False), None, n, k, False)
    groups = -(-k // group_size)
    if group_size % GROUP_UNIT or number_format.bits > MOST_BITS:
        raise ValueError(
            f"integer groups have a multiple of {GROUP_UNIT} elements of at most {MOST_BITS} bits, got "
            f"{group_size} elements of {number_format.bits} bits"
        )
    if group_scale.shape != (n, groups) or group_offset.shape != (n, groups):
        raise ValueError(f"terms of groups must be {(n, groups)}, got {group_scale.shape} and {group_offset.shape}")
    natural = group_size % 32 != 0
    words = pack_fields(_rows_in_tiles(codes, gated), number_format.bits, natural)
    terms = _pack_terms(group_scale, group_offset, group_size, words.shape[1], gated)
    return PreparedWeights(words, terms, n, k, natural)


@functools.partial(jax.jit, static_argnames=("number_format", "gated"))
def planes_of(
    weights: PreparedWeights, number_format: BipolarFormat, *, gated: bool = False
) -> UInt32[Array, "planes n words"]:
    """The bit planes that `prepare` was given."""
    codes = jnp.moveaxis(unpack_fields(weights.words, weights.natural_order), 1, 2)
    codes = codes.reshape(-1, codes.shape[2] * STAGE)
    if gated:
        codes = jnp.moveaxis(codes.reshape(-1, 2, TILE_ROWS // 2, codes.shape[1]), 1, 0)
        codes = codes.reshape(2, -1, codes.shape[-1])[:, : weights.n // 2].reshape(weights.n, -1)
    return pack_codes(codes[: weights.n, : weights.k], number_format)


def in_natural_order(x_words: UInt32[Array, "1 m words"]) -> UInt32[Array, "1 m words"]:
    """Tokens of kind "int8" (`arithmetic.operands`) with their bytes in natural order."""
    values = jax.lax.bitcast_convert_type(x_words, jnp.uint8).reshape(*x_words.shape[:2], -1, 8, 4)
    return jax.lax.bitcast_convert_type(values.swapaxes(-1, -2).reshape(*x_words.shape, 4), jnp.uint32)


def pack_fields(
    codes: UInt8[Array, "rows k"], bits: int, natural_order: bool
) -> UInt32[Array, "tiles stages bits vector_words"]:
    """Words of codes that are filled up to whole tiles and stages."""
    tiles, stages = codes.shape[0] // TILE_ROWS, codes.shape[1] // STAGE
    codes = codes.reshape(tiles, TILE_ROWS, stages, STAGE).swapaxes(1, 2)
    if not natural_order:  # position 4 j + i of 32 is element 8 i + j
        codes = codes.reshape(tiles, stages, TILE_ROWS, STEPS, 4, 8).swapaxes(-1, -2)
    # Row: block, warp, half of the warp's rows, lane / 4; position: step, half, lane % 4, byte.
    codes = codes.reshape(tiles, stages, 2, 4, 2, 8, STEPS, 2, 4, 4)
    codes = codes.transpose(0, 1, 3, 5, 8, 6, 2, 7, 4, 9)  # warp, lane, step, register, byte
    codes = codes.reshape(tiles, stages, WARPGROUP, STEPS, REGISTERS, 4).astype(jnp.uint32)
    vectors = []
    for width, shift in fields_of(bits):
        fields = ((codes >> shift) & ((1 << width) - 1)).reshape(*codes.shape[:4], width, 8 // width, 4)
        shifts = _shifts(width, fields.ndim)
        words = jnp.sum(fields << shifts, axis=(-1, -2), dtype=jnp.uint32)
        vectors.append(words.reshape(tiles, stages, WARPGROUP, width, VECTOR).swapaxes(2, 3))
    return jnp.concatenate(vectors, axis=2).reshape(tiles, stages, bits, WORDS_PER_VECTOR)


def unpack_fields(
    words: UInt32[Array, "*batch bits vector_words"], natural_order: bool
) -> UInt8[Array, "*batch rows k"]:
    """Codes of whole tiles, [TILE_ROWS, STAGE] each: the inverse of `pack_fields`."""
    batch = words.shape[:-2]
    codes = _registers_of(words)
    codes = codes.reshape(*batch, 4, 8, 4, STEPS, 2, 2, 2, 4)  # warp, lane / 4, lane % 4, step, block, half, row, byte
    axes = [len(batch) + axis for axis in (4, 0, 6, 1, 3, 5, 2, 7)]
    codes = codes.transpose(*range(len(batch)), *axes).reshape(*batch, TILE_ROWS, STAGE)
    return codes if natural_order else _in_element_order(codes)


def expanded_in_jnp(
    words: UInt32[Array, "bits vector_words"], terms: UInt32[Array, "chunks chunk_words"] | None
) -> Int[Array, "rows k"]:
    """The unsigned bytes that threads make of one tile and stage: codes, or s * u + o + 128; in order of position."""
    codes = unpack_fields(words, natural_order=True).astype(jnp.int32)
    if terms is None:
        return codes
    scale, offset = unpack_terms(terms)
    chunk = STAGE // terms.shape[0]
    return codes * jnp.repeat(scale, chunk, axis=1) + jnp.repeat(offset, chunk, axis=1)


def unpack_terms(terms: UInt32[Array, "chunks chunk_words"]) -> tuple[Array, Array]:
    """s and o + 128 of one tile and stage, int32 [TILE_ROWS, chunks] each."""
    chunks = terms.shape[0]
    shifts = 8 * jnp.arange(4, dtype=jnp.uint32).reshape(1, 1, 4)
    pairs = ((terms[..., None] >> shifts) & 0xFF).astype(jnp.int32).reshape(chunks, 4, 8, 2, 2, 2)
    pairs = pairs.transpose(5, 3, 1, 4, 2, 0).reshape(2, TILE_ROWS, chunks)  # block, warp, half of rows, lane / 4
    return pairs[0], pairs[1]


def _shifts(width: int, ndim: int) -> UInt32[Array, "..."]:
    """Where the fields of a word begin, by register and byte: the last two of `ndim` axes."""
    register, byte = (
        jnp.arange(count, dtype=jnp.uint32).reshape((1,) * (ndim - 2) + shape)
        for count, shape in ((8 // width, (-1, 1)), (4, (1, -1)))
    )
    return width * register + 8 * byte


def _in_element_order(codes: UInt8[Array, "*batch k"]) -> UInt8[Array, "*batch k"]:
    """Codes at interleaved positions, by element."""
    *batch, k = codes.shape
    return codes.reshape(*batch, k // 32, 8, 4).swapaxes(-1, -2).reshape(*batch, k)


def _pack_terms(scale, offset, group_size: int, stages: int, gated: bool) -> UInt32[Array, "tiles stages chunks words"]:
    chunk = math.gcd(group_size, STAGE)
    chunks = STAGE // chunk
    group = np.minimum(np.arange(stages * chunks) * chunk // group_size, scale.shape[1] - 1)
    biased = jnp.stack([scale, jax.lax.bitcast_convert_type(offset, jnp.uint8) ^ np.uint8(OFFSET_BIAS)])
    pairs = jnp.stack([_in_tiles_of_rows(term, gated) for term in biased[..., group]])
    pairs = pairs.reshape(2, -1, 2, 4, 2, 8, stages, chunks)  # tile, block, warp, half of the rows, lane / 4
    pairs = pairs.transpose(1, 6, 7, 3, 5, 2, 4, 0)
    words = jax.lax.bitcast_convert_type(pairs.reshape(*pairs.shape[:6], 4), jnp.uint32)
    return words.reshape(-1, stages, chunks, CHUNK_WORDS)


def _rows_in_tiles(codes: UInt8[Array, "n k"], gated: bool) -> UInt8[Array, "rows columns"]:
    """Codes filled up to whole tiles and stages with zeros."""
    return _in_tiles_of_rows(jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % STAGE))), gated)


def _in_tiles_of_rows(array: Array, gated: bool) -> Array:
    """Rows filled up to whole tiles with zeros; gated, 64 gates and their 64 values in turn."""
    if gated:
        half = array.shape[0] // 2
        array = jnp.pad(array.reshape(2, half, -1), ((0, 0), (0, -half % (TILE_ROWS // 2)), (0, 0)))
        array = array.reshape(2, -1, TILE_ROWS // 2, array.shape[-1]).swapaxes(0, 1)
        return array.reshape(-1, array.shape[-1])
    return jnp.pad(array, ((0, -array.shape[0] % TILE_ROWS), (0, 0)))


def _registers_of(words: UInt32[Array, "*batch bits vector_words"]) -> UInt8[Array, "*batch threads steps registers 4"]:
    """Every thread's registers of codes."""
    *batch, bits, _ = words.shape
    codes = jnp.uint32(0)
    first = 0
    for width, shift in fields_of(bits):
        vectors = words[..., first : first + width, :].reshape(*batch, width, WARPGROUP, VECTOR).swapaxes(-3, -2)
        vectors = vectors.reshape(*batch, WARPGROUP, STEPS, width, 1, 1)
        shifts = _shifts(width, vectors.ndim)
        fields = ((vectors >> shifts) & ((1 << width) - 1)) << shift
        codes = codes + fields.reshape(*batch, WARPGROUP, STEPS, REGISTERS, 4)
        first += width
    return codes.astype(jnp.uint8)

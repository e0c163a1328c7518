"""Codes laid out in the order in which threads expand them for int8 tensor cores: the paper's matrix preprocessing.

A tile is TILE_ROWS rows of weights times a stage of K, STAGE elements. It has PARTS parts of PART_ROWS rows, each held
by one warp. A warp multiplies its part in STEPS steps of 32 elements, each with an instruction for the rows of either
block b. In one step a thread holds eight registers of A, four bytes each: register 4 b + 2 h + p of lane 4 r + t of the
warp of part w, in byte i, is

    row 64 b + 16 w + 8 p + r of the tile,  position 32 step + 16 h + 4 t + i of the stage

(PTX ISA, the fragments of A of wgmma m64nNk32 and of mma m16n8k32). Byte i of the thread's words holds bits of the
codes at byte i of the registers. A register whose codes lie in one word is made by a shift and a mask, and most do:
`fields_of` says where the bits are. From 3 bits on the thread has as many words for a step as codes have bits. Of 1 and
2 bits a word has the codes of one row: word 2 b + p those of the stage, or with 2 bits of either half of it, so that
words are also fragments of A of mma m16n8k128, whose operands are bits. A thread's words of a stage are `bits` vectors
of four, each next to those of its neighbours: loads of 16 bytes without bank conflicts. A part's stages follow each
other in memory.

A byte's position in its step follows the tokens (`TokenOrder`). In the order of "bytes" position 4 j + i is element
8 i + j, as `quantize_rows` interleaves bytes. In that of "floats" position 16 h + 4 t + 2 e + p is element
16 h + 8 p + 2 t + e: bytes 0 and 2 of a register become the neighbours 2 t and 2 t + 1 of one operand of 16-bit floats,
bytes 1 and 3 those 8 later, so that float tokens lie in memory as they are. Groups that are no multiple of 32 need it,
too: a register has elements of one half of a step.

A group's scale s and offset o (`quantize.integer_groups`) are the bytes s and o + 128, for every chunk of K in which no
group ends: gcd(group_size, STAGE) elements. The pairs of rows r and r + 8 share a word, and a thread's words of both
blocks are neighbours: word 2 r + b of a part.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, Shaped, UInt8, UInt32

from bipolar_jax.quantize.integer_groups import SMALLEST_VALUE

TokenOrder = Literal["bytes", "floats"]

TILE_ROWS = STAGE = 128
PARTS = 4  # of a tile: its warps
PART_ROWS = TILE_ROWS // PARTS
LANES = 32
STEPS = 4  # of a stage
_STEP = STAGE // STEPS
VECTOR = 4  # words that a thread loads at once
WORDS_PER_VECTOR = LANES * VECTOR  # of a part
REGISTERS = 8  # of A, in one step
MOST_BITS_BY_ROW = 2  # of codes of which a word has one row's
CHUNK_WORDS = PART_ROWS // 2  # of the terms of one chunk and part
GROUP_UNIT = 16  # elements: half of a step, which is as far as a register reaches
OFFSET_BIAS = -SMALLEST_VALUE  # makes s * u + o an unsigned byte
_EVERY_BYTE = 0x01010101


class Field(NamedTuple):
    """Bits of the codes of one register.

    Attributes:
      word: of `step_words`.
      position: of the lowest bit, in every byte of the word.
      width: number of bits.
      shift: of the lowest bit, in the code.
    """

    word: int
    position: int
    width: int
    shift: int


def step_words(bits: int, step: int) -> range:
    """Which of a thread's words of a stage hold the codes of a step."""
    if bits <= MOST_BITS_BY_ROW:
        count = STEPS // bits  # steps whose codes are in the same words
        return range(VECTOR * (step // count), VECTOR * (step // count + 1))
    return range(bits * step, bits * (step + 1))


@functools.cache
def fields_of(bits: int, step: int) -> tuple[tuple[Field, ...], ...]:
    """The fields of each of the REGISTERS registers of a step.

    A byte holds as many whole codes as it can. What is left of the bytes holds the codes of the last registers, bit
    after bit. Of 1 and 2 bits all bytes are those of one row: bits of a byte are, from the highest, those of step
    mod 2, h and step // 2, and of 2 bits the code's own instead of the latter.
    """
    if bits <= MOST_BITS_BY_ROW:
        first = 4 * (step % 2) + (step // 2 if bits == 1 else 0)
        return tuple((Field(r // 4 * 2 + r % 2, first + r // 2 % 2 * 2, bits, 0),) for r in range(REGISTERS))
    whole = 8 // bits * bits  # registers, and bits of a byte, that hold whole codes
    fields = [[Field(r % bits, r // bits * bits, bits, 0)] for r in range(whole)]
    rest = [(word, position) for word in range(bits) for position in range(whole, 8)]
    for _ in range(whole, REGISTERS):
        code, rest = rest[:bits], rest[bits:]
        words = sorted({word for word, _ in code})
        own = [[position for at, position in code if at == word] for word in words]
        shifts = [sum(map(len, own[:i])) for i in range(len(own))]
        fields.append([Field(word, p[0], len(p), shift) for word, p, shift in zip(words, own, shifts, strict=True)])
    return tuple(map(tuple, fields))


def order_of_groups(group_size: int | None) -> TokenOrder:
    """The order of positions that groups, or the lack of them, allow; "floats" is always allowed."""
    return "bytes" if group_size is None or group_size % _STEP == 0 else "floats"


def positions_of(elements: Shaped[Array, "*batch k"], order: TokenOrder) -> Shaped[Array, "*batch k"]:
    """Elements of whole steps, in the order of their positions."""
    axes, permutation = ((4, 8), (1, 0)) if order == "bytes" else ((2, 2, 4, 2), (0, 2, 3, 1))
    return _permuted(elements, axes, permutation)


def elements_of(positions: Shaped[Array, "*batch k"], order: TokenOrder) -> Shaped[Array, "*batch k"]:
    """The inverse of `positions_of`."""
    axes, permutation = ((8, 4), (1, 0)) if order == "bytes" else ((2, 4, 2, 2), (0, 3, 1, 2))
    return _permuted(positions, axes, permutation)


def _permuted(steps: Array, axes: tuple[int, ...], permutation: tuple[int, ...]) -> Array:
    batch = steps.shape[:-1]
    by_axis = steps.reshape(*batch, steps.shape[-1] // _STEP, *axes)
    leading = range(len(batch) + 1)
    return by_axis.transpose(*leading, *(len(leading) + axis for axis in permutation)).reshape(steps.shape)


def pack_fields(
    codes: UInt8[Array, "rows k"], bits: int, order: TokenOrder
) -> UInt32[Array, "tiles parts stages bits vector_words"]:
    """Words of codes that are filled up to whole tiles and stages."""
    tiles, stages = codes.shape[0] // TILE_ROWS, codes.shape[1] // STAGE
    codes = positions_of(codes, order)
    # Rows: tile, block, part, half of the part's rows, lane / 4; positions: stage, step, half, lane % 4, byte.
    codes = codes.reshape(tiles, 2, PARTS, 2, 8, stages, STEPS, 2, 4, 4)
    codes = codes.transpose(0, 2, 5, 4, 8, 6, 1, 7, 3, 9)  # tile, part, stage, lane, step, register, byte
    codes = codes.reshape(tiles, PARTS, stages, LANES, STEPS, REGISTERS, 4).astype(jnp.uint32)
    if bits <= MOST_BITS_BY_ROW:
        vectors = _words_by_row(codes, bits)
    else:
        byte_shifts = 8 * jnp.arange(4, dtype=jnp.uint32).reshape((1,) * (codes.ndim - 2) + (4,))
        words = [jnp.uint32(0)] * bits
        for register, fields in enumerate(fields_of(bits, 0)):
            for word, position, width, shift in fields:
                field = (codes[..., register, :] >> shift) & ((1 << width) - 1)
                words[word] += jnp.sum(field << (position + byte_shifts), axis=-1, dtype=jnp.uint32)
        vectors = jnp.stack(words, axis=-1)
    vectors = vectors.reshape(tiles, PARTS, stages, LANES, bits, VECTOR)
    return vectors.swapaxes(3, 4).reshape(tiles, PARTS, stages, bits, WORDS_PER_VECTOR)


def unpack_part(words: UInt32[Array, "*batch bits vector_words"]) -> UInt8[Array, "*batch part_rows positions"]:
    """Codes of parts of a stage: row 16 b + 8 p + r, in order of position."""
    batch = words.shape[:-2]
    codes = _registers_of(words).reshape(*batch, 8, 4, STEPS, 2, 2, 2, 4)  # lane / 4, lane % 4, step, b, h, p, byte
    axes = [len(batch) + axis for axis in (3, 5, 0, 2, 4, 1, 6)]
    return codes.transpose(*range(len(batch)), *axes).reshape(*batch, PART_ROWS, STAGE)


def unpack_fields(
    words: UInt32[Array, "tiles parts stages bits vector_words"], order: TokenOrder
) -> UInt8[Array, "rows k"]:
    """Codes of whole tiles and stages: the inverse of `pack_fields`."""
    tiles, _, stages = words.shape[:3]
    codes = elements_of(unpack_part(words), order)
    codes = codes.reshape(tiles, PARTS, stages, 2, PART_ROWS // 2, STAGE).transpose(0, 3, 1, 4, 2, 5)
    return codes.reshape(tiles * TILE_ROWS, stages * STAGE)


def row_codes(
    words: UInt32[Array, "tiles parts stages bits vector_words"], rows: Int[Array, " ids"], order: TokenOrder
) -> UInt8[Array, "ids k"]:
    """Codes of some rows of whole tiles; reads the words of four lanes for each, which hold four rows."""
    tiles, _, stages, bits, _ = words.shape
    tile, part, lane_row, block, half = _places(rows)
    lanes = words.reshape(tiles, PARTS, stages, bits, 8, LANES // 8 * VECTOR)[tile, part, :, :, lane_row]
    codes = _registers_of(lanes).reshape(-1, stages, LANES // 8, STEPS, 2, 2, 2, 4)  # lane % 4, step, b, h, p, byte
    codes = _chosen(_chosen(codes, block, 4), half, 5)
    codes = codes.transpose(0, 1, 3, 4, 2, 5).reshape(-1, stages, STAGE)
    return elements_of(codes, order).reshape(-1, stages * STAGE)


def pack_terms(
    scale: UInt8[Array, "rows groups"], offset: Int8[Array, "rows groups"], group_size: int, stages: int
) -> UInt32[Array, "tiles parts stages chunks chunk_words"]:
    """s and o + 128 of every chunk; rows are filled up to whole tiles."""
    chunk = math.gcd(group_size, STAGE)
    chunks = STAGE // chunk
    group = np.minimum(np.arange(stages * chunks) * chunk // group_size, scale.shape[1] - 1)
    biased = jnp.stack([scale, jax.lax.bitcast_convert_type(offset, jnp.uint8) ^ np.uint8(OFFSET_BIAS)])
    # Byte, tile, block, part, half of the part's rows, lane / 4, stage, chunk.
    pairs = biased[..., group].reshape(2, -1, 2, PARTS, 2, 8, stages, chunks).transpose(1, 3, 6, 7, 5, 2, 4, 0)
    words = jax.lax.bitcast_convert_type(pairs.reshape(*pairs.shape[:6], 4), jnp.uint32)
    return words.reshape(-1, PARTS, stages, chunks, CHUNK_WORDS)


def part_terms(
    terms: UInt32[Array, "*batch chunks chunk_words"],
) -> tuple[Int[Array, "*batch part_rows chunks"], Int[Array, "*batch part_rows chunks"]]:
    """s and o + 128 of parts of a stage, int32: row 16 b + 8 p + r."""
    *batch, chunks, _ = terms.shape
    shifts = 8 * jnp.arange(4, dtype=jnp.uint32).reshape((1,) * terms.ndim + (4,))
    pairs = ((terms[..., None] >> shifts) & 0xFF).astype(jnp.int32)
    pairs = pairs.reshape(*batch, chunks, 8, 2, 2, 2)  # chunk, lane / 4, block, half of the rows, byte
    axes = [len(batch) + axis for axis in (2, 3, 1, 0)]
    scale, offset = (
        pairs[..., byte].transpose(*range(len(batch)), *axes).reshape(*batch, PART_ROWS, chunks) for byte in range(2)
    )
    return scale, offset


def unpack_terms(
    terms: UInt32[Array, "tiles parts stages chunks chunk_words"], group_size: int, k: int
) -> tuple[UInt8[Array, "rows groups"], Int8[Array, "rows groups"]]:
    """s and o of whole tiles: the inverse of `pack_terms`."""
    tiles, _, stages, chunks, _ = terms.shape
    group_starts = _first_chunks(group_size, k, chunks)

    def of_rows(part: Array) -> Array:
        rows = part.reshape(tiles, PARTS, stages, 2, PART_ROWS // 2, chunks).transpose(0, 3, 1, 4, 2, 5)
        return rows.reshape(tiles * TILE_ROWS, stages * chunks)[:, group_starts]

    scale, offset = map(of_rows, part_terms(terms))
    return scale.astype(jnp.uint8), (offset - OFFSET_BIAS).astype(jnp.int8)


def row_terms(
    terms: UInt32[Array, "tiles parts stages chunks chunk_words"], rows: Int[Array, " ids"], group_size: int, k: int
) -> tuple[UInt8[Array, "ids groups"], Int8[Array, "ids groups"]]:
    """s and o of some rows of whole tiles."""
    tiles, _, stages, chunks, _ = terms.shape
    tile, part, lane_row, block, half = _places(rows)
    words = terms.reshape(tiles, PARTS, stages, chunks, 8, 2)[tile, part, :, :, lane_row, block]
    words = words.reshape(-1, stages * chunks)[:, _first_chunks(group_size, k, chunks)]
    words >>= 16 * half[:, None].astype(jnp.uint32)
    offset = ((words >> 8) & 0xFF).astype(jnp.int32) - OFFSET_BIAS
    return (words & 0xFF).astype(jnp.uint8), offset.astype(jnp.int8)


def expand_part(
    words: UInt32[Array, "*batch bits vector_words"], terms: UInt32[Array, "*batch chunks chunk_words"] | None
) -> Int[Array, "*batch part_rows positions"]:
    """The unsigned bytes that a warp makes of its part of a stage: codes, or s * u + o + 128; in order of position."""
    codes = unpack_part(words).astype(jnp.int32)
    if terms is None:
        return codes
    scale, offset = part_terms(terms)
    chunk = STAGE // terms.shape[-2]
    return codes * jnp.repeat(scale, chunk, axis=-1) + jnp.repeat(offset, chunk, axis=-1)


def expand_tile(
    words: UInt32[Array, "parts bits vector_words"], terms: UInt32[Array, "parts chunks chunk_words"] | None
) -> Int[Array, "rows positions"]:
    """`expand_part` of all parts of one tile and stage, in the order of the tile's rows."""
    parts = expand_part(words, terms).reshape(PARTS, 2, PART_ROWS // 2, STAGE)
    return parts.swapaxes(0, 1).reshape(TILE_ROWS, STAGE)


def _words_by_row(codes: UInt32[Array, "*batch steps registers 4"], bits: int) -> UInt32[Array, "*batch bits vector"]:
    """A lane's words, vector after vector, of 1 and 2 bits."""
    batch = codes.shape[:-3]
    # Vector; step of those that share words; block, half and row of a register; byte.
    fields = codes.reshape(*batch, bits, STEPS // bits, 2, 2, 2, 4) << _places_by_row(bits, len(batch))
    axes = [len(batch) + axis for axis in (1, 3, 5)]
    return jnp.sum(fields, axis=axes, dtype=jnp.uint32).reshape(*batch, bits, VECTOR)


def _places_by_row(bits: int, batch: int) -> UInt32[Array, "*batch bits steps 1 2 1 4"]:
    """Where codes of 1 and 2 bits begin in their words, after axes of size 1."""
    positions = [fields_of(bits, step)[2 * half][0].position for step in range(STEPS) for half in range(2)]
    # No array of constants: kernels that are interpreted capture scalars alone.
    positions = jnp.stack(list(map(jnp.uint32, positions))).reshape((1,) * batch + (bits, STEPS // bits, 1, 2, 1, 1))
    return positions + 8 * jnp.arange(4, dtype=jnp.uint32).reshape((1,) * (batch + 5) + (4,))


def _registers_of(words: UInt32[Array, "*batch bits lane_words"]) -> UInt8[Array, "*batch lanes steps registers 4"]:
    """The registers of codes of neighbouring lanes, VECTOR words each for a bit."""
    *batch, bits, _ = words.shape
    lanes = words.shape[-1] // VECTOR
    words = words.reshape(*batch, bits, lanes, VECTOR).swapaxes(-3, -2)
    if bits <= MOST_BITS_BY_ROW:
        by_register = words.reshape(*batch, lanes, bits, 1, 2, 1, 2, 1)
        codes = (by_register >> _places_by_row(bits, len(batch) + 1)) & ((1 << bits) - 1)
        return codes.astype(jnp.uint8).reshape(*batch, lanes, STEPS, REGISTERS, 4)
    words = words.reshape(*batch, lanes, STEPS, bits)
    registers = []
    for fields in fields_of(bits, 0):
        parts = []
        for word, position, width, shift in fields:
            mask = jnp.uint32(((1 << width) - 1) * _EVERY_BYTE)
            parts.append(((words[..., word] >> position) & mask) << shift)
        registers.append(functools.reduce(jnp.bitwise_or, parts))
    return jax.lax.bitcast_convert_type(jnp.stack(registers, axis=-1), jnp.uint8)


def _places(rows: Int[Array, " ids"]) -> tuple[Int[Array, " ids"], ...]:
    """Tile, part, lane / 4, block and half of the part's rows: r, b and p of the module's docstring."""
    return rows // TILE_ROWS, rows // 16 % PARTS, rows % 8, rows // 64 % 2, rows // 8 % 2


def _chosen(pairs: Array, index: Int[Array, " ids"], axis: int) -> Array:
    """Entry index[i], 0 or 1, of an axis of array i."""
    first, second = (jnp.take(pairs, entry, axis=axis) for entry in range(2))
    return jnp.where(index.reshape(-1, *[1] * (first.ndim - 1)) == 0, first, second)


def _first_chunks(group_size: int, k: int, chunks: int) -> Int[np.ndarray, " groups"]:
    """The first chunk of every group, of `chunks` a stage."""
    return np.arange(-(-k // group_size)) * group_size // (STAGE // chunks)

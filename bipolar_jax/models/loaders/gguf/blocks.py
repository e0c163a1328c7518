"""Blocks of GGUF's integer types: stored bytes to codes, and to the scales that the file has.

Layouts are those of ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml, and of gguf-py's
dequantizers, which the tests compare with. gguf-py names Q1_0 and its size alone; its bits, and Q2_0 (number 42, 64
weights in 18 bytes), are block_q1_0 and block_q2_0 there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer, UInt8

from bipolar_jax.format import TERNARY, BipolarFormat, as_format
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers
from bipolar_jax.packing.block_scaled_array import BlockForm
from bipolar_jax.quantize import Precision

_Bytes = UInt8[np.ndarray, "blocks bytes"]
_NIBBLES, _PAIRS = (0, 4), (0, 2, 4, 6)
_K_SCALES = 12  # bytes that hold the 6-bit integers of the groups of a K type
_TRIT_POWERS = (1, 3, 9, 27, 81)


@dataclasses.dataclass(frozen=True)
class BlockFields:
    """The numbers of some blocks.

    Attributes:
      stored: integers of the weights, from 0 on.
      scale, minimum: float16 of each block.
      group_scales, group_minimums: integers of the groups of each block.
    """

    stored: UInt8[np.ndarray, "blocks weights"]
    scale: Float[np.ndarray, "blocks 1"]
    minimum: Float[np.ndarray, "blocks 1"] | None = None
    group_scales: Integer[np.ndarray, "blocks groups"] | None = None
    group_minimums: Integer[np.ndarray, "blocks groups"] | None = None

    def negative(self, form: BlockForm) -> np.ndarray:
        """Whether the step of each group is below 0, bool [blocks, groups]; a block without groups is one."""
        if self.group_scales is None:
            return self.scale < 0
        scales = self.group_scales & 15 if form.group_scales == "nibbles" else self.group_scales
        return self.scale.astype(np.float32) * scales.astype(np.float32) < 0


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of tensors whose weights are integers.

    Attributes:
      bits: of the stored integers, or the ternary format.
      group_size: weights that share a step.
      form: how numbers follow, see `BlockScaledArray`.
      fields: bytes of blocks to their numbers.
    """

    bits: int | BipolarFormat
    group_size: int
    form: BlockForm
    fields: Callable[[_Bytes], BlockFields]

    def kind(self, a_bits: int | None, axis: int = -2) -> PackedKind:
        """The kind of kernels of this type; a_bits None is float activations."""
        has_offset = self.form.minimum or self.form.shift(as_format(self.bits)) != 0
        calibration = "minmax" if has_offset else None  # the only one with offsets
        precision = Precision(self.bits, a_bits, self.group_size, calibration, "float")
        return PackedKind(precision, has_offset, form=self.form, axis=axis)

    def numbers(self, rows: UInt8[np.ndarray, "rows bytes"], columns: int) -> PackedNumbers:
        """The numbers of rows of so many weights; the codes of groups with a negative step are complemented.

        Raises:
          ValueError: ternary weights with an integer that is none.
        """
        most = as_format(self.bits).max_value
        blocks = rows.reshape(len(rows) * columns // self.form.block_size, -1)
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # scales that are not finite are reported where they are packed
            fields = self.fields(blocks)
            negative = np.repeat(fields.negative(self.form), self.group_size, axis=1)
        if self.bits is TERNARY and fields.stored.max() > most:
            raise ValueError("it holds codes above 2, which no ternary weight has: the file is damaged")
        codes = np.where(negative, np.uint8(most) - fields.stored, fields.stored).reshape(len(rows), columns)
        scale, minimum, group_scales, group_minimums = (
            None if array is None else np.ascontiguousarray(array.reshape(len(rows), -1))
            for array in (fields.scale, fields.minimum, fields.group_scales, fields.group_minimums)
        )
        return PackedNumbers(codes, scale, minimum, None, group_scales, group_minimums)

    def dequantize(self, rows: UInt8[np.ndarray, "rows bytes"], columns: int) -> Float[np.ndarray, "rows columns"]:
        """The weights of a type without minimums and without integers of groups, float32."""
        fields = self.fields(rows.reshape(len(rows) * columns // self.form.block_size, -1))
        integers = (self.form.factor * fields.stored.astype(np.int16) - self.form.zero).astype(np.float32)
        return (fields.scale.astype(np.float32) * integers).reshape(len(rows), columns)


def _half(raw: _Bytes) -> Float[np.ndarray, "blocks numbers"]:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float16, copy=False)


def _split(raw: _Bytes, *sizes: int) -> list[_Bytes]:
    """Consecutive fields of so many bytes; the last one is the rest."""
    return np.split(raw, np.cumsum(sizes), axis=1)


def _unpack(raw: _Bytes, shifts: tuple[int, ...], run: int) -> UInt8[np.ndarray, "blocks numbers"]:
    """Bits of bytes: of `run` bytes those at the first shift, then those at the next; then of the next bytes."""
    bits = 8 // len(shifts)
    parts = raw.reshape(len(raw), -1, 1, run) >> np.array(shifts, np.uint8).reshape(1, 1, -1, 1)
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _bits(raw: _Bytes) -> UInt8[np.ndarray, "blocks numbers"]:
    return np.unpackbits(raw, axis=1, bitorder="little")


def _q4_0(raw: _Bytes) -> BlockFields:
    scale, stored = _split(raw, 2)
    return BlockFields(_unpack(stored, _NIBBLES, 16), _half(scale))


def _q4_1(raw: _Bytes) -> BlockFields:
    scale, minimum, stored = _split(raw, 2, 2)
    return BlockFields(_unpack(stored, _NIBBLES, 16), _half(scale), _half(minimum))


def _q5_0(raw: _Bytes) -> BlockFields:
    scale, high, low = _split(raw, 2, 4)
    return BlockFields(_unpack(low, _NIBBLES, 16) | (_bits(high) << np.uint8(4)), _half(scale))


def _q5_1(raw: _Bytes) -> BlockFields:
    scale, minimum, rest = _split(raw, 2, 2)
    return dataclasses.replace(_q5_0(np.concatenate([scale, rest], axis=1)), minimum=_half(minimum))


def _q8_0(raw: _Bytes) -> BlockFields:
    scale, stored = _split(raw, 2)
    return BlockFields(stored ^ np.uint8(128), _half(scale))


def _q1_0(raw: _Bytes) -> BlockFields:
    scale, stored = _split(raw, 2)
    return BlockFields(_bits(stored), _half(scale))


def _q2_0(raw: _Bytes) -> BlockFields:
    scale, stored = _split(raw, 2)
    return BlockFields(_unpack(stored, _PAIRS, 1), _half(scale))


def _q2_k(raw: _Bytes) -> BlockFields:
    scales, stored, scale, minimum = _split(raw, 16, 64, 2)
    return BlockFields(_unpack(stored, _PAIRS, 32), _half(scale), -_half(minimum), scales)


def _q3_k(raw: _Bytes) -> BlockFields:
    high, low, scales, scale = _split(raw, 32, 64, _K_SCALES)
    low_scales, high_scales = _split(scales, 8)
    group_scales = _unpack(low_scales, _NIBBLES, 8) | (_unpack(high_scales, _PAIRS, 4) << np.uint8(4))
    stored = _unpack(low, _PAIRS, 32) | (_unpack(high, tuple(range(8)), 32) << np.uint8(2))
    return BlockFields(stored, _half(scale), None, group_scales.view(np.int8) - np.int8(32))


def _k_scales(raw: _Bytes) -> tuple[UInt8[np.ndarray, "blocks groups"], UInt8[np.ndarray, "blocks groups"]]:
    """6-bit scales and minimums of 8 groups: the first four are the low bits of bytes 0 to 3 and 4 to 7."""
    scales, minimums, low = _split(raw, 4, 4)
    high = (part >> np.uint8(2) & np.uint8(0x30) for part in (scales, minimums))
    last = ((low & np.uint8(15)) | next(high), (low >> np.uint8(4)) | next(high))
    first = (scales & np.uint8(63), minimums & np.uint8(63))
    return tuple(np.concatenate(pair, axis=1) for pair in zip(first, last, strict=True))


def _q4_k(raw: _Bytes) -> BlockFields:
    scale, minimum, scales, stored = _split(raw, 2, 2, _K_SCALES)
    return BlockFields(_unpack(stored, _NIBBLES, 32), _half(scale), -_half(minimum), *_k_scales(scales))


def _q5_k(raw: _Bytes) -> BlockFields:
    head, high, low = _split(raw, 4 + _K_SCALES, 32)
    fields = _q4_k(np.concatenate([head, low], axis=1))
    return dataclasses.replace(fields, stored=fields.stored | (_unpack(high, tuple(range(8)), 32) << np.uint8(4)))


def _q6_k(raw: _Bytes) -> BlockFields:
    low, high, scales, scale = _split(raw, 128, 64, 16)
    stored = _unpack(low, _NIBBLES, 64) | (_unpack(high, _PAIRS, 32) << np.uint8(4))
    return BlockFields(stored, _half(scale), None, scales.view(np.int8))


def _trits(raw: _Bytes, run: int, count: int) -> UInt8[np.ndarray, "blocks numbers"]:
    """The highest `count` digits of bytes, which are fractions of 256 in base 3."""
    powers = np.array(_TRIT_POWERS[:count], np.uint8).reshape(1, 1, -1, 1)
    rest = raw.reshape(len(raw), -1, 1, run) * powers
    return ((rest.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(raw), -1)


def _tq1_0(raw: _Bytes) -> BlockFields:
    first, second, third, scale = _split(raw, 32, 16, 4)
    return BlockFields(
        np.concatenate([_trits(first, 32, 5), _trits(second, 16, 5), _trits(third, 4, 4)], axis=1), _half(scale)
    )


def _tq2_0(raw: _Bytes) -> BlockFields:
    stored, scale = _split(raw, 64)
    return BlockFields(_unpack(stored, _PAIRS, 32), _half(scale))


BLOCK_TYPES = {
    "Q4_0": BlockType(4, 32, BlockForm(32, zero=8), _q4_0),
    "Q4_1": BlockType(4, 32, BlockForm(32, zero=0, minimum=True), _q4_1),
    "Q5_0": BlockType(5, 32, BlockForm(32, zero=16), _q5_0),
    "Q5_1": BlockType(5, 32, BlockForm(32, zero=0, minimum=True), _q5_1),
    "Q8_0": BlockType(8, 32, BlockForm(32, zero=128), _q8_0),
    "Q2_K": BlockType(2, 16, BlockForm(256, zero=0, minimum=True, group_scales="nibbles"), _q2_k),
    "Q3_K": BlockType(3, 16, BlockForm(256, zero=4, group_scales="int8"), _q3_k),
    "Q4_K": BlockType(4, 32, BlockForm(256, zero=0, minimum=True, group_scales="uint8"), _q4_k),
    "Q5_K": BlockType(5, 32, BlockForm(256, zero=0, minimum=True, group_scales="uint8"), _q5_k),
    "Q6_K": BlockType(6, 16, BlockForm(256, zero=32, group_scales="int8"), _q6_k),
    "TQ1_0": BlockType(TERNARY, 256, BlockForm(256, zero=1), _tq1_0),
    "TQ2_0": BlockType(TERNARY, 256, BlockForm(256, zero=1), _tq2_0),
    "Q1_0": BlockType(1, 128, BlockForm(128, zero=1, factor=2), _q1_0),
    "Q2_0": BlockType(2, 64, BlockForm(64, zero=1), _q2_0),
}

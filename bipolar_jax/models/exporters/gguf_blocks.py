"""Packed weights as blocks of GGUF's types: integers exactly, their scales and minimums rounded to float16.

A packed number is step * (code - zero), or step * code + minimum. Q4_0, Q5_0 and Q8_0 hold the first where the integers
fit them; symmetric grids do, whose values are odd integers. Q4_1 and Q5_1 hold the second. The layouts are those of
`loaders.gguf.blocks`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Integer, UInt8

from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.packing import BipolarArray, BlockScaledArray
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers

BLOCK = 32
# From the fewest bytes to the most.
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ADVICE = (
    "quantize or calibrate to at most 5 bits in groups of a multiple of 32, such as W4A16g32, or to at most 7 bits on "
    'a symmetric grid, such as W7A16g32f with calibration "mse"'
)
_EXACT = 2**24


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix in one of the types.

    Attributes:
      type_name: one of TYPES.
      raw: bytes of its rows.
      error: root of the squared differences that rounding the scales made, relative to that of the squared weights.
    """

    type_name: str
    raw: UInt8[np.ndarray, "n bytes"]
    error: float


@dataclasses.dataclass(frozen=True)
class _Integers:
    """Numbers scale * (stored - zero) + minimum, of every group of 32; minimum is None for types without."""

    stored: Integer[np.ndarray, "n k"]
    scale: Float[np.ndarray, "n groups"]
    minimum: Float[np.ndarray, "n groups"] | None


def encode(array: BipolarNumbers, type_name: str | None = None) -> Blocks:
    """The blocks of a packed matrix, its contracted axis as rows of bytes.

    Args:
      array: without batch axes.
      type_name: None takes the first of TYPES that holds the integers.

    Raises:
      ValueError: no type, or not that one, holds the integers; scales beyond float16. The message says what would do.
    """
    if type_name not in (None, *TYPES):
        raise ValueError(f"type {type_name!r:.40} is not written, use one of {', '.join(TYPES)}")
    if not isinstance(array, BipolarArray | BlockScaledArray):
        raise ValueError("weights are laid out for a device: export the model before prepare_for_inference")
    k, size = array.contracted_size, array.group_size
    if k % BLOCK or (size is not None and size % BLOCK):
        raise ValueError(f"{k} inputs in groups of {size or k} are no whole blocks of {BLOCK}: {ADVICE}")
    candidates = TYPES if type_name is None else (type_name,)
    for name in candidates:
        if (found := _integers(array, name)) is not None:
            return _blocks(array, name, found)
    raise ValueError(f"W{array.format.name} in groups of {size or k} fits none of {', '.join(candidates)}: {ADVICE}")


def _integers(array: BipolarArray | BlockScaledArray, type_name: str) -> _Integers | None:
    """The array's numbers as a type holds them; None if it does not."""
    target = BLOCK_TYPES[type_name]
    if isinstance(array, BlockScaledArray):
        form = array.form
        if form == target.form and array.bits == target.bits:  # its own, with the signs of its scales
            scale, codes = np.asarray(array.block_scale), np.asarray(array.codes()).astype(np.int32)
            negative = np.repeat(scale < 0, BLOCK, axis=1)
            stored = np.where(negative, array.format.max_value - codes, codes)
            minimum = None if array.block_minimum is None else np.asarray(array.block_minimum).astype(np.float32)
            return _Integers(stored, scale.astype(np.float32), minimum)
        array = array.with_scales()
    if target.form.minimum:
        return _with_minimums(array) if array.bits <= target.bits else None
    found = _around_zero(array)
    if found is None:
        return None
    stored = found.stored + target.form.zero
    fits = stored.min() >= 0 and stored.max() < 1 << target.bits
    return dataclasses.replace(found, stored=stored) if fits else None


def _with_minimums(array: BipolarArray) -> _Integers:
    scale, offset = _float_grid(array)
    codes = np.asarray(array.codes()).astype(np.int32)
    return _Integers(codes, _of_blocks(array, 2 * scale), _of_blocks(array, offset - scale * array.format.max_value))


def _around_zero(array: BipolarArray) -> _Integers | None:
    """Signed integers whose 0 stands for 0; None if the array has no such."""
    codes, most = np.asarray(array.codes()).astype(np.int32), array.format.max_value
    if array.groups is not None:
        integers = np.asarray(array.groups.values(array.codes(), array.group_size)).astype(np.int32)
        return _Integers(integers, _of_blocks(array, np.asarray(array.scale)), None)
    scale = np.asarray(array.scale)
    if array.offset is None:
        factor = 2 if most % 2 else 1  # ternary values are even
        return _Integers((2 * codes - most) * factor // 2, _of_blocks(array, scale * 2 / factor), None)
    step, offset = 2 * scale, np.asarray(array.offset)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(step == 0, 0, np.round(most / 2 - offset / step))
    if not (step * (np.float32(most / 2) - zero.astype(np.float32)) == offset).all() or np.abs(zero).max() > _EXACT:
        return None
    zeros = np.repeat(_of_blocks(array, zero).astype(np.int32), BLOCK, axis=1)
    return _Integers(codes - zeros, _of_blocks(array, step), None)


def _float_grid(array: BipolarArray) -> tuple[Float[np.ndarray, "n groups"], Float[np.ndarray, "n groups"]]:
    if array.groups is not None:
        scale, offset = array.groups.float_grid(array.scale, array.format)
        return np.asarray(scale), np.asarray(offset)
    scale = np.asarray(array.scale)
    return scale, np.zeros_like(scale) if array.offset is None else np.asarray(array.offset)


def _of_blocks(array: BipolarArray, per_scale: np.ndarray) -> Float[np.ndarray, "n blocks"]:
    """The number of every block, from that of every group, or of every row."""
    blocks = array.contracted_size // BLOCK
    if per_scale.shape[1] == 1:
        return np.repeat(per_scale, blocks, axis=1)
    return np.repeat(per_scale, array.group_size // BLOCK, axis=1)[:, :blocks]


def _blocks(array: BipolarNumbers, type_name: str, found: _Integers) -> Blocks:
    zero = BLOCK_TYPES[type_name].form.zero
    rounded = [None if each is None else _half(each) for each in (found.scale, found.minimum)]
    scale, minimum = (None if each is None else np.repeat(each.astype(np.float32), BLOCK, axis=1) for each in rounded)
    numbers = scale * (found.stored - zero).astype(np.float32) + (0 if minimum is None else minimum)
    expected = np.asarray(array.dequantize())
    expected = expected if array.axis == -1 else expected.T
    size = float(np.square(expected, dtype=np.float64).sum())
    error = float(np.square((numbers - expected).astype(np.float64)).sum())
    blocks = found.stored.astype(np.uint8).reshape(-1, BLOCK)
    halves = [each.reshape(-1, 1).astype("<f2").view(np.uint8) for each in rounded if each is not None]
    raw = np.concatenate([*halves, _packed(blocks, type_name)], axis=1)
    return Blocks(type_name, raw.reshape(len(found.stored), -1), (error / size) ** 0.5 if size else 0.0)


def _half(numbers: Float[np.ndarray, "n blocks"]) -> Float[np.ndarray, "n blocks"]:
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float16)
    if bad := rounded.size - int(np.isfinite(rounded).sum()):
        raise ValueError(f"{bad} of {rounded.size} scales or minimums are beyond float16: scale the weights down")
    return rounded


def _packed(stored: UInt8[np.ndarray, "blocks weights"], type_name: str) -> UInt8[np.ndarray, "blocks bytes"]:
    """The bytes of the integers: the first half of a block in low nibbles, fifth bits before them."""
    if type_name == "Q8_0":
        return stored ^ np.uint8(128)
    low = stored & np.uint8(15)
    nibbles = low[:, : BLOCK // 2] | low[:, BLOCK // 2 :] << np.uint8(4)
    if type_name.startswith("Q4"):
        return nibbles
    return np.concatenate([np.packbits(stored >> np.uint8(4), axis=1, bitorder="little"), nibbles], axis=1)

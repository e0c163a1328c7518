"""Integers of 1 to 8 bits packed into 32-bit words, as checkpoints store them: low bits first."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, Integer, UInt8

WORD_BITS = 32


def num_dense_words(count: int, bits: int) -> int:
    """Words of a row of `count` integers in a stream without padding: integers may straddle words."""
    return -(-count * bits // WORD_BITS)


def num_aligned_words(count: int, bits: int) -> int:
    """Words of a row of `count` integers, WORD_BITS // bits in each word."""
    return -(-count // (WORD_BITS // bits))


def pack_dense(codes: UInt8[np.ndarray, "rows count"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Inverse of `unpack_dense`; zeros fill the last word of every row."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream = planes.reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % WORD_BITS)))
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def unpack_dense(words: Integer[np.ndarray, "rows words"], bits: int, count: int) -> UInt8[np.ndarray, "rows count"]:
    """The first `count` integers of every row: integer i is the bits bits * i and following of the row's stream."""
    if WORD_BITS % bits == 0:  # none straddles a word
        return unpack_aligned(words, bits, count)
    stream = np.unpackbits(_as_bytes(words), axis=-1, bitorder="little", count=count * bits)
    return np.packbits(stream.reshape(len(words), count, bits), axis=-1, bitorder="little")[..., 0]


def unpack_aligned(words: Integer[np.ndarray, "rows words"], bits: int, count: int) -> UInt8[np.ndarray, "rows count"]:
    """The first `count` integers of every row: each word has WORD_BITS // bits of them, and then padding."""
    if 8 % bits == 0:
        shifts, lanes = np.arange(0, 8, bits, dtype=np.uint8), _as_bytes(words)
        mask = np.uint8((1 << bits) - 1)
    else:
        shifts = np.arange(WORD_BITS // bits, dtype=np.uint32) * np.uint32(bits)
        lanes, mask = np.ascontiguousarray(words).view(np.uint32), np.uint32((1 << bits) - 1)
    codes = (lanes[..., None] >> shifts) & mask
    return codes.astype(np.uint8, copy=False).reshape(len(words), -1)[:, :count]


def unpack_either(words: Integer[np.ndarray, "rows words"], bits: int, count: int) -> UInt8[np.ndarray, "rows count"]:
    """`unpack_dense` or `unpack_aligned`, told apart by the number of words.

    Raises:
      ValueError: another number of words, or one that both packings have although they differ.
    """
    dense, aligned = num_dense_words(count, bits), num_aligned_words(count, bits)
    found = words.shape[1]
    if found not in (dense, aligned):
        raise ValueError(f"{count} integers of {bits} bits take {dense} words, or {aligned} if aligned, not {found}")
    if dense == aligned and WORD_BITS % bits and count > WORD_BITS // bits:
        raise ValueError(f"{found} words of {count} integers of {bits} bits do not tell how they are packed")
    return unpack_dense(words, bits, count) if found == dense else unpack_aligned(words, bits, count)


def _as_bytes(words: Integer[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows bytes"]:
    return np.ascontiguousarray(words, dtype=words.dtype.newbyteorder("<")).view(np.uint8)

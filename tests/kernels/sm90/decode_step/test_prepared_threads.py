"""What threads do with prepared weights and the token beside them, for a warpgroup of simulated ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_step import part_sums, token_bytes
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import row_of_parts
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.packing.fields import expand_part, pack_fields
from tests.support import warpgroup_simulator

THREAD = np.arange(128, dtype=np.int32)
A_FORMATS = [BipolarFormat(8), BipolarFormat(3), BipolarFormat(1)]


def stored_token(codes: np.ndarray, a_format: BipolarFormat, natural_order: bool) -> np.ndarray:
    """Words of a slice, as threads store them."""
    words = codes.astype(np.uint8).reshape(128, 2, 4).view(np.int32)[..., 0]
    slice_words = np.full(token_bytes.SLICE_WORDS, -1, np.int32)
    store = token_bytes.store_natural if natural_order else token_bytes.store_interleaved
    signed = [token_bytes.signed_bytes(word, a_format) for word in words.T]
    store(ptx.pointer(slice_words, ptx.SHARED), THREAD, signed)
    return slice_words


@pytest.mark.parametrize("a_format", A_FORMATS, ids=lambda a_format: f"A{a_format.bits}")
@pytest.mark.parametrize("natural_order", [False, True])
def test_signed_codes_are_stored_by_position(a_format, natural_order, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    codes = np.random.default_rng(0).integers(0, a_format.max_value + 1, 1024)
    found = stored_token(codes, a_format, natural_order)
    signed = (codes - a_format.code_offset).astype(np.int8)
    np.testing.assert_array_equal(found.view(np.uint32), token_bytes.words_of(jnp.asarray(signed), natural_order))
    positions = signed if natural_order else signed.reshape(-1, 4, 8).swapaxes(1, 2)  # 4 j + i is element 8 i + j
    words = jnp.asarray(found.view(np.uint32))
    np.testing.assert_array_equal(token_bytes.positions_of(words), positions.reshape(8, 128))


@pytest.mark.parametrize(
    ("bits", "chunks", "stages"),
    [(1, 1, 8), (1, 1, 4), (2, 2, 8), (3, 8, 4), (4, 1, 4), (5, 4, 2), (6, 1, 2), (8, 0, 2)],
)
def test_stages_are_multiplied(bits, chunks, stages, monkeypatch):
    """All loads of a slice, and the sums of two parts behind each other."""
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(bits)
    w_format, a_format, natural = BipolarFormat(bits), A_FORMATS[0], chunks == 8
    words = rng.integers(0, 2**32, (8, bits, 128), np.uint32)
    terms = None
    if chunks:
        scale = rng.integers(0, 255 // w_format.max_value + 1, (8, chunks, 16, 2))
        offset = rng.integers(0, 256 - scale * w_format.max_value)
        terms = np.stack([scale, offset], axis=-1).astype(np.uint8).reshape(8, chunks, 16, 4).view(np.uint32)[..., 0]
    codes = rng.integers(0, 256, 1024)
    token = stored_token(codes, a_format, natural)
    expansion = Expansion(bits, chunks)
    warpgroup_simulator.bank_conflicts[0] = 0
    total = [np.zeros(128, np.int32)] * 8
    for load in range(8 // stages):
        mine = slice(load * stages, (load + 1) * stages)
        arrays = [words[mine], token] + ([] if terms is None else [terms[mine]])
        pointers = [ptx.pointer(np.ascontiguousarray(array), ptx.SHARED) for array in arrays]
        for valid in (0, 1):  # 0 adds nothing
            options = (ptx.int32(load), [ptx.int32(valid)], stages, expansion)
            total = part_sums.add_stages_of_warp(total, pointers, *options)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    sums = np.zeros(80, np.int32)
    for _ in range(2):
        part_sums.add_sums_of_warp(ptx.pointer(sums, ptx.SHARED), total, ptx.int32(3), 48)
    weights = expand_part(jnp.asarray(words), None if terms is None else jnp.asarray(terms))
    numbers = token_bytes.positions_of(jnp.asarray(token.view(np.uint32)))
    expected = 2 * np.einsum("srk,sk->r", np.asarray(weights, np.int64), np.asarray(numbers, np.int64))
    wanted = np.zeros(80, np.int32)
    wanted[3:19], wanted[51:67] = expected[:16], expected[16:]
    np.testing.assert_array_equal(sums, wanted)


def test_rows_of_parts():
    """By the layout itself: every row of two tiles has its index as the code of its elements."""
    rows = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 128))
    words = pack_fields(jnp.asarray(rows), 8, natural_order=False)  # tiles, parts, one stage
    found = np.asarray(expand_part(words, None))[..., 0].reshape(-1)
    np.testing.assert_array_equal(found, row_of_parts(np.arange(256)))

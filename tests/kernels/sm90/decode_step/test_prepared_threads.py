"""What threads do with prepared weights and the token beside them, for a warpgroup of simulated ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_step import part_sums, token_bytes
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import row_of_parts
from bipolar_jax.packing.fields import TokenOrder, expand_part, pack_fields, positions_of
from tests.kernels.sm90.decode_step.part_stages import check_stages
from tests.support import warpgroup_simulator

THREAD = np.arange(128, dtype=np.int32)
A_FORMATS = [BipolarFormat(8), BipolarFormat(3), BipolarFormat(1)]


def stored_token(codes: np.ndarray, a_format: BipolarFormat, order: TokenOrder) -> np.ndarray:
    """Words of a slice, as threads store them."""
    words = codes.astype(np.uint8).reshape(128, 2, 4).view(np.int32)[..., 0]
    slice_words = np.full(token_bytes.SLICE_WORDS, -1, np.int32)
    layout = token_bytes.ByteLayout(order)
    arranged = layout.arrange(THREAD, list(words.T), None, a_format)
    layout.store(ptx.pointer(slice_words, ptx.SHARED), THREAD, arranged)
    return slice_words


@pytest.mark.parametrize("a_format", A_FORMATS, ids=lambda a_format: f"A{a_format.bits}")
@pytest.mark.parametrize("order", ["bytes", "floats"])
def test_signed_codes_are_stored_by_position(a_format, order, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    codes = np.random.default_rng(0).integers(0, a_format.max_value + 1, 1024)
    found = stored_token(codes, a_format, order)
    signed = (codes - a_format.code_offset).astype(np.int8)
    np.testing.assert_array_equal(found.view(np.uint32), token_bytes.words_of(jnp.asarray(signed), order))
    positions = positions_of(signed, order)
    words = jnp.asarray(found.view(np.uint32))
    np.testing.assert_array_equal(token_bytes.positions_of(words), positions.reshape(8, 128))


@pytest.mark.parametrize(
    ("bits", "chunks", "stages"),
    [(1, 1, 8), (1, 1, 4), (2, 2, 8), (3, 8, 4), (4, 1, 4), (5, 4, 2), (6, 1, 2), (8, 0, 1)],
)
def test_stages_are_multiplied(bits, chunks, stages, monkeypatch):
    """All loads of a slice, and the sums of two parts behind each other."""
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(bits)
    token = stored_token(rng.integers(0, 256, 1024), A_FORMATS[0], order="floats" if chunks == 8 else "bytes")
    numbers = token_bytes.positions_of(jnp.asarray(token.view(np.uint32)))
    check_stages(part_sums, bits, chunks, stages, token, numbers, rng, sums_of_thread=8)


def test_rows_of_parts():
    """By the layout itself: every row of two tiles has its index as the code of its elements."""
    rows = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 128))
    words = pack_fields(jnp.asarray(rows), 8, order="bytes")  # tiles, parts, one stage
    found = np.asarray(expand_part(words, None))[..., 0].reshape(-1)
    np.testing.assert_array_equal(found, row_of_parts(np.arange(256)))

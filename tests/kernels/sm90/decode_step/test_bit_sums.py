"""Weights of 1 and 2 bits beside the bit planes of one token: by simulated threads, interpreted, and compiled."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_step import token_bytes
from bipolar_jax.kernels.sm90.decode_step.bit_sums import bit_products, token_planes
from tests.kernels.sm90.decode_step.layers_twin import Case, check_layers, compiled, preset_case
from tests.kernels.sm90.decode_step.part_stages import check_stages
from tests.support import sm90_compile, warpgroup_simulator

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

THREAD = np.arange(128, dtype=np.int32)
ALL = np.ones(1024, bool)


def stored_token(codes: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
    """Words of a slice, as threads store them."""
    words = codes.astype(np.uint8).reshape(128, 2, 4).view(np.int32)[..., 0]
    slice_words, layout = np.full(token_bytes.SLICE_WORDS, -1, np.int32), token_planes.PlaneLayout()
    arranged = layout.arrange(THREAD, list(words.T), inside, BipolarFormat(8))
    layout.store(ptx.pointer(slice_words, ptx.SHARED), THREAD, arranged)
    return slice_words


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_are_stored_as_planes(bits, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    codes = np.random.default_rng(0).integers(0, 1 << bits, 1024)
    before = warpgroup_simulator.bank_conflicts[0]
    found = jnp.asarray(stored_token(codes).view(np.uint32))
    assert warpgroup_simulator.bank_conflicts[0] == before
    a_format = BipolarFormat(bits)
    np.testing.assert_array_equal(found, token_planes.PlaneLayout().words_of(jnp.asarray(codes), ALL, a_format))
    by_position = codes.reshape(-1, 4, 8).swapaxes(1, 2)  # position 4 j + i is element 8 i + j
    np.testing.assert_array_equal(token_planes.codes_of_planes(found), by_position.reshape(8, 128))


def test_codes_beyond_k_are_stored_as_zeros(monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    codes = np.random.default_rng(0).integers(0, 256, 1024)
    short = np.where(np.arange(1024) < 200, codes, 0)
    np.testing.assert_array_equal(stored_token(codes, THREAD < 25), stored_token(short))


@pytest.mark.parametrize(
    ("bits", "chunks", "stages"),
    [(1, 0, 8), (1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 0, 4), (2, 1, 8), (2, 2, 8), (2, 4, 4)],
)
def test_stages_are_multiplied(bits, chunks, stages, monkeypatch):
    """All loads of a slice, and the sums of two parts behind each other."""
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(bits)
    token = stored_token(rng.integers(0, 256, 1024))
    codes = token_planes.codes_of_planes(jnp.asarray(token.view(np.uint32)))
    check_stages(bit_products, bits, chunks, stages, token, codes, rng, sums_of_thread=4)


SMALL = Case(1, 128, 128, 1, 1, 1, 8, 64, 32, prepared=True, group_size=64)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        # A product of more loads than slots, K slices of other warpgroups, and sizes that end within a stage.
        (dataclasses.replace(SMALL, hidden=192, ffn=1344, heads=2, calibration="minmax", group_size=128), 3),
        (dataclasses.replace(SMALL, w_bits=2, a_bits=3, hidden=192, ffn=448, group_size=96), 2),
        (dataclasses.replace(SMALL, a_bits=5, group_size=32), 2),
        (dataclasses.replace(SMALL, a_bits=4, group_size=None, bias=True, calibration="minmax"), 2),
        (dataclasses.replace(SMALL, w_bits=2, a_bits=2, group_size=None), 2),
    ],
    ids=lambda value: f"W{value.w_bits}A{value.a_bits}g{value.group_size}" if isinstance(value, Case) else f"{value}",
)
@pytest.mark.covered("the kernel, by `make gpu-test`; threads, by the tests above")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


@pytest.mark.parametrize(
    ("precision", "group_size", "cache_bits"),
    [((1, 8), 128, None), ((2, 8), 64, None), ((2, 8), 64, 8), ((1, 8), 128, 4), ((1, 8), 32, 8), ((2, 4), None, 4)],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.sample(1)
def test_compiles_without_spills(precision, group_size, cache_bits):
    fields = {"cache_bits": cache_bits, "prepared": True, "group_size": group_size}
    assert compiled(preset_case("llama-3-8b", *precision, **fields)).stack_bytes == 0

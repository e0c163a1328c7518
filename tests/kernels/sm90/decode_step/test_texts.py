"""The decode step of several texts: interpreted against the twin of each, its threads simulated, and compiled."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import LayerNorm
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_step import part_sums, phases, text_products, token_bytes
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import TEXT_SLICE_WORDS, LayersShape, PreparedLayout
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.packing.fields import expand_part
from tests.kernels.sm90.decode_step.layers_twin import SWIGLU, Case, check_layers, compiled, preset_case
from tests.support import sm90_compile, warpgroup_simulator

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

SHAPE = LayersShape(
    num_layers=1, hidden=128, ffn=128, heads=1, kv_heads=1, head_dim=128, a_format=BipolarFormat(8),
    w_format=BipolarFormat(4), norm="rms", norm_eps=1e-5, activation=SWIGLU, blocks=4, texts=2,
    prepared=PreparedLayout(0, False),
)  # fmt: skip
ROTATED = dataclasses.replace(SWIGLU, rotation=hadamard(192, block=64))
TEXTS = Case(1, 128, 128, 1, 1, 4, 8, 64, 40, prepared=True, group_size=64, texts=2)


@pytest.mark.parametrize(
    ("case", "blocks", "slices_at_once"),
    [
        (TEXTS, 2, 2),
        # Three columns of four, tokens that are read in turn, one of them twice.
        (dataclasses.replace(TEXTS, texts=3, norm=LayerNorm), 3, 4),
        # Heads of 64, sizes that end within a tile, a cache that is full.
        (dataclasses.replace(TEXTS, hidden=192, ffn=192, heads=2, head_dim=64, length=64, activation=ROTATED), 5, 2),
    ],
    ids=["two", "three", "heads of 64"],
)
@pytest.mark.covered("the phases, by test_heads_of_64.py; threads, below; the kernel, by `make gpu-test`")
def test_layers_are_the_twins(case, blocks, slices_at_once, monkeypatch):
    monkeypatch.setattr(phases, "_SLICES_AT_ONCE", slices_at_once)
    check_layers(case, blocks)


@pytest.mark.parametrize("texts", [2, 3, 4])
def test_threads_multiply_the_tokens_of_texts(texts, monkeypatch):
    """One load of a slice, and the sums of a part at the place of each text."""
    warpgroup_simulator.install(monkeypatch)
    shape = dataclasses.replace(SHAPE, texts=texts)
    rng, (bits, max_rows) = np.random.default_rng(texts), (4, shape.max_rows)
    words = rng.integers(0, 2**32, (4, bits, 128), np.uint32)
    tokens = rng.integers(0, 2**32, (texts, TEXT_SLICE_WORDS), np.uint32)
    expansion = Expansion(bits, 0)
    token = text_products.token_of_lane(ptx.pointer(tokens, ptx.SHARED), shape)
    total, pointers = [np.zeros(128, np.int32)] * 8, [ptx.pointer(words, ptx.SHARED), token]
    warpgroup_simulator.bank_conflicts[0] = 0
    total = part_sums.add_stages_of_warp(total, pointers, ptx.int32(1), [], 4, expansion)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    sums = np.zeros(texts * max_rows, np.int32)
    text_products.add_sums_of_warp(ptx.pointer(sums, ptx.SHARED), total, ptx.int32(3), 48, shape)
    weights = np.asarray(expand_part(jnp.asarray(words), None), np.int64)
    for text, found in enumerate(sums.reshape(texts, max_rows)):
        numbers = np.asarray(token_bytes.positions_of(jnp.asarray(tokens[text, :-4])), np.int64)[4:]
        expected, wanted = np.einsum("srk,sk->r", weights, numbers), np.zeros(max_rows, np.int64)
        wanted[3:19], wanted[51:67] = expected[:16], expected[16:]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "precision", "group_size", "cache_bits", "texts"),
    [
        ("llama-3-8b", (4, 8), 128, None, 4),
        ("llama-3-8b", (8, 8), None, None, 3),
        ("llama-3-8b", (3, 8), 128, None, 4),
        ("llama-3-8b", (4, 8), 128, 8, 4),
        ("qwen3-8b", (4, 8), 128, 4, 4),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.sample(1)
def test_compiles_without_spills(name, precision, group_size, cache_bits, texts):
    fields = {"cache_bits": cache_bits, "prepared": True, "group_size": group_size, "texts": texts}
    assert compiled(preset_case(name, *precision, **fields)).stack_bytes == 0

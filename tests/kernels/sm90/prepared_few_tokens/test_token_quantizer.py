"""Tokens that the product's kernel quantizes: the numbers of `quantize_and_pack` in front of it, and compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, RMSNorm
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import FloatTokensToQuantize, few_tokens_product, float_rows
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    FewTokensTiling,
    FloatRows,
)
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import quantizing_tiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.token_quantizer import RECORD_WORDS, quantize_token
from bipolar_jax.kernels.sm90.quantize_rows.launch import plan, quantize_and_pack
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import SCRATCH_WORDS
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import CHUNK_WORDS, PARTS, WORDS_PER_VECTOR
from tests.kernels.sm90.prepared_few_tokens.test_prepared_few_tokens import (
    A8,
    INTERPRET,
    NO_RACES,
    problem_of,
    swizzled,
    weights,
)
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def prologue_of(name: str | None, k: int):
    vector = jnp.asarray(np.random.default_rng(1).standard_normal(k), jnp.bfloat16)
    prologues = {
        None: None,
        "rms": RMSNorm(vector, 1e-5),
        "layer": LayerNorm(vector, vector[::-1], 1e-5),
        "gated": Activation("silu", gated=True),
        "rotated": Hadamard((64,), k // 64),
    }
    return prologues[name]


@pytest.mark.parametrize(
    ("name", "m", "k", "tiling", "interpret"),
    [
        # Two pairs of blocks share tokens; one block has no unit. More turns than slots.
        ("rms", 3, 384, FewTokensTiling(1, parts=3, slots=2, quantizers=2), INTERPRET),
        # Fewer warpgroups than tokens.
        (None, 9, 128, FewTokensTiling(2, parts=8, slots=2, quantizers=1), NO_RACES),
    ],
    ids=["norm, two blocks", "nine tokens"],
)
@pytest.mark.sample(1)
def test_numbers_are_those_of_quantized_tokens(name, m, k, tiling, interpret):
    n, prologue = 200, prologue_of(name, k)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((m, k)), jnp.bfloat16)
    w = weights(4, 64, n, k)[0].prepare()
    tokens = FloatTokensToQuantize(x, prologue)
    found = few_tokens_product(tokens, w, A8, None, jnp.float32, tiling=tiling, blocks=4, interpret=interpret)
    assert not races_found()
    packed = quantize_and_pack(x, A8, "int8", prologue=prologue, interpret=NO_RACES)
    plain = FewTokensTiling(1, parts=4, slots=2)
    expected = few_tokens_product(packed, w, A8, None, jnp.float32, tiling=plain, blocks=1, interpret=NO_RACES)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "k"), [("rms", 640), (None, 4224)])
def test_threads_store_tokens_as_products_load_them(name, k, monkeypatch):
    """Every token's swizzled rows and record, from a warpgroup's threads."""
    m, prologue = 3, prologue_of(name, k)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((m, k)), jnp.bfloat16)
    expected = quantize_tokens(x, A8, prologue)
    quantizer, (rows, *vectors) = plan(x, A8, "int8", prologue)
    quantizer = dataclasses.replace(quantizer, threads=128)
    tiling = FewTokensTiling(1, quantizers=1)
    floats = float_rows(FloatTokensToQuantize(x, prologue), k)
    problem = dataclasses.replace(
        problem_of(4, 1, m, 128, k, tiling, dtype=jnp.float32), quantizer=quantizer, float_rows=floats
    )
    tokens = np.zeros((m, problem.token_rows, 32), np.uint32)
    records, scratch = np.zeros((m, RECORD_WORDS), np.int32), np.zeros(SCRATCH_WORDS, np.int32)
    rows, vectors = np.array(rows), [np.array(vector) for vector in vectors]
    warpgroup_simulator.install(monkeypatch)
    for token in range(m):
        quantize_token(
            problem, warpgroup_simulator.int32(token), rows[token : token + 1], scratch, tokens, records, *vectors
        )
    wanted = np.zeros((m, problem.token_rows, 128), np.uint8)
    in_bytes = np.array(code_words(expected.codes.astype(jnp.uint8), A8, "int8")).view(np.uint8)
    wanted[:, : k // 128] = in_bytes.reshape(m, -1, 128)
    np.testing.assert_array_equal(tokens.view(np.uint8), swizzled(wanted))
    sums, zero_codes, scales = records[:, 0], records[:, 1], records[:, 2].view(np.float32)
    np.testing.assert_array_equal(sums, expected.codes.sum(1, dtype=jnp.int32))
    np.testing.assert_array_equal(zero_codes, (expected.zero_value + A8.max_value) // 2)
    np.testing.assert_allclose(scales, expected.scale, rtol=2**-22)  # a norm sums in its own order


def test_the_planner_takes_what_fits():
    rows = FloatRows(16, 4096, 8192, 8192)
    assert quantizing_tiling(rows, 28672, 4, 1).quantizers == 4
    assert quantizing_tiling(dataclasses.replace(rows, m=1), 28672, 4, 1).quantizers == 1
    assert quantizing_tiling(dataclasses.replace(rows, k=14336, row_bytes=28672), 4096, 4, 1) is None
    for m in range(1, 17):
        for k in (128, 1024, 4096, 8192, 14336):
            for n in (1, 4096, 28672):
                floats = FloatRows(m, k, 2 * k, 2 * k)
                tiling = quantizing_tiling(floats, n, 4, 1)
                if tiling is not None:
                    problem = problem_of(4, 1, m, n, k, tiling)
                    problem = dataclasses.replace(problem, float_rows=floats)
                    assert tiling.slots >= 2
                    assert problem.shared_memory_bytes <= SHARED_MEMORY_BYTES


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize(("name", "m"), [("rms", 16), ("gated", 16), ("layer", 8), ("rotated", 1)])
@pytest.mark.sample(1)
def test_it_compiles_without_spills(name, m):
    n = k = 4096
    prologue = prologue_of(name, k)
    words = jax.ShapeDtypeStruct((n // 128, PARTS, k // 128, 4, WORDS_PER_VECTOR), jnp.uint32)
    terms = jax.ShapeDtypeStruct((n // 128, PARTS, k // 128, 1, CHUNK_WORDS), jnp.uint32)
    scale, sums = (jax.ShapeDtypeStruct((n, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    w = PreparedArray(words, terms, scale, sums, BipolarFormat(4), k, -2, 128, False)
    x, residual = (jax.ShapeDtypeStruct((m, width), jnp.bfloat16) for width in (k * prologue.parts, n))
    tiling = quantizing_tiling(float_rows(FloatTokensToQuantize(x, prologue), k), n, 4, 1)

    def multiply(x, w, residual):
        tokens = FloatTokensToQuantize(x, prologue)
        return few_tokens_product(tokens, w, A8, None, jnp.bfloat16, residual=residual, tiling=tiling)

    report = sm90_compile.compile_for_h200(multiply, x, w, residual, ptx=True)[1]
    assert report.spill_bytes == report.stack_bytes == 0
    used = PRODUCER_REGISTERS + tiling.warpgroups * CONSUMER_REGISTERS[tiling.warpgroups]
    assert used <= report.registers[0] * (tiling.warpgroups + 1)
    assert ("cp.async.bulk.shared::cluster.shared::cta" in report.text) == (m > 4)

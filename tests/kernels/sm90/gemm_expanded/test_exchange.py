"""Sums of splits of K that blocks exchange: what threads do with them, when, and the compiled kernel.

Interpret mode has no blocks that run at once: there `expanded_matmul` leaves the sums to `add_splits`, which is
the twin. The exchange itself runs on a GPU alone.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic import exchanged_sums
from bipolar_jax.kernels.sm90.backend.expanded_products import quantized_matmul
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import CHUNK_WORDS, PARTS, WORDS_PER_VECTOR
from tests.support import sm90_compile, warpgroup_simulator

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8, W4 = BipolarFormat(8), BipolarFormat(4)
TILING = Tiling(64, 128, "alternate", slots=8, band=8, band_axis="n", splits=4)


@pytest.mark.parametrize(("tokens", "splits"), [(64, 4), (128, 2), (64, 8)])
def test_each_split_gets_the_sums_of_its_tokens(tokens, splits, monkeypatch):
    """A thread's words are [blocks of rows, groups of eight tokens, 4]; a share is some of the groups."""
    warpgroup_simulator.install(monkeypatch)
    monkeypatch.setattr(exchanged_sums, "load_from_blocks", lambda pointer: ptx.load(pointer, 4))
    count = tokens  # of 128 * tokens words, 128 threads have as many each
    words = np.random.default_rng(0).integers(-(2**20), 2**20, (splits, count, warpgroup_simulator.THREADS), np.int32)
    sums = np.zeros(splits * words[0].size, np.int32)
    pointer = ptx.pointer(sums, ptx.GLOBAL)
    for split in range(splits):
        exchanged_sums.leave_sums(list(words[split]), pointer, warpgroup_simulator.int32(split))
    groups = tokens // 8
    expected = words.sum(0).reshape(2, splits, groups // splits, 4, -1)
    for split in range(splits):
        found = exchanged_sums.add_shares(2, groups, pointer, warpgroup_simulator.int32(split), splits)
        np.testing.assert_array_equal(np.stack(found), expected[:, split].reshape(-1, warpgroup_simulator.THREADS))


def test_blocks_exchange_where_all_run_at_once():
    problem = ExpandedProblem(64, 4096, ExpandedRecovery("int8", A8, W4, 4096, True), TILING)

    def can_exchange(n=4096, **changes):
        return dataclasses.replace(problem, n=n, tiling=dataclasses.replace(TILING, **changes)).can_exchange

    assert can_exchange()
    assert can_exchange(n=8192)  # 256 tiles, one for each consumer
    assert not can_exchange(n=16384)  # a consumer would wait for its own next tile
    assert not can_exchange(splits=3)  # of eight groups of tokens
    assert not can_exchange(splits=1)
    assert not exchanged_sums.may_exchange()  # unless asked to


@needs_compiler
def test_the_exchange_compiles_without_spills_or_passes():
    """Of a whole operation two kernels are left: the quantizer clears what the product counts in."""
    m, n, k = 50, 4096, 4096
    tiles, stages = n // 128, k // 128
    words, terms = (
        jax.ShapeDtypeStruct((tiles, PARTS, stages, *last), jnp.uint32)
        for last in ((W4.bits, WORDS_PER_VECTOR), (1, CHUNK_WORDS))
    )
    scale, sums = (jax.ShapeDtypeStruct((n, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    weights = PreparedArray(words, terms, scale, sums, W4, k, -2, 128, False)

    def multiply(x, weights, residual):
        with exchanged_sums.exchanged_sums():
            return quantized_matmul(x, weights, A8, None, residual=residual)

    x, residual = (jax.ShapeDtypeStruct((m, size), jnp.bfloat16) for size in (k, n))
    program, report = sm90_compile.compile_for_h200(multiply, x, weights, residual, ptx=True)
    assert program.as_text().count(" custom-call(") == len(report.registers) == 2
    assert not re.search(r" (copy|fusion|add)\(", program.as_text())
    assert max(report.registers) == 168
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.serialized_wgmma
    # Sums are in memory before the arrival is counted, and read after it has been awaited.
    counted = report.text.index("red.relaxed.gpu.global")
    awaited = report.text.index("ld.acquire.gpu")
    assert report.text.rindex("st.global.v4", 0, counted) < report.text.rindex("fence.acq_rel.gpu", 0, counted)
    assert counted < awaited < report.text.index("ld.relaxed.gpu.global.v4")

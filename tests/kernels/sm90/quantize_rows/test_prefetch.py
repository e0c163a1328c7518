"""The quantizer of few tokens prefetches what their product reads first: the right bytes, each once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.backend import operations
from bipolar_jax.kernels.sm90.backend.prefetching import read_first
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.quantize_rows.prefetch import CHUNK_BYTES, FirstBytes, prefetch_chunks
from tests.support import sm90_compile, warpgroup_simulator

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def prepared(n: int, k: int, group_size: int | None = 128):
    """The shapes of weights of 4 bits."""
    scales = None if group_size is None else "integer"
    return jax.eval_shape(lambda: bj.quantize(jnp.zeros((k, n)), 4, 0, group_size=group_size, scales=scales).prepare())


@pytest.mark.parametrize(
    "first",
    [
        FirstBytes(rows=3, row_bytes=20480, ranges=1, spacing=20480, nbytes=CHUNK_BYTES + 32),
        FirstBytes(rows=5, row_bytes=960, ranges=3, spacing=320, nbytes=48),
        FirstBytes(rows=300, row_bytes=32, ranges=2, spacing=16, nbytes=16),  # more than one for a thread
    ],
)
def test_blocks_share_the_bytes(first, monkeypatch):
    array, blocks = np.zeros((first.rows, first.row_bytes), np.uint8), 2
    warpgroup_simulator.prefetches.clear()
    with monkeypatch.context() as patch:
        warpgroup_simulator.install(patch)
        for block in range(blocks):
            prefetch_chunks(first, array, warpgroup_simulator.int32(block), blocks)
    times = np.zeros_like(array)
    for start, nbytes in warpgroup_simulator.prefetches:
        times.reshape(-1)[start : start + nbytes] += 1
    expected = np.zeros_like(array)
    for i in range(first.ranges):
        expected[:, i * first.spacing : i * first.spacing + first.nbytes] = 1
    np.testing.assert_array_equal(times, expected)


def test_what_blocks_read_at_the_same_time_comes_first():
    stage = 4 * 512  # bytes of a part's words; its terms are 64 more
    w = prepared(28672, 4096)
    # 896 parts in units of 7, all at the same time.
    (words, of_words), (terms, of_terms) = read_first(w, FewTokensTiling(4, parts=7), nbytes=896 * 5 * (stage + 64))
    assert (words, terms) == (w.words, w.terms)
    assert of_words == FirstBytes(896, 32 * stage, 1, 32 * stage, 5 * stage)
    assert of_terms == FirstBytes(896, 32 * 64, 1, 32 * 64, 5 * 64)
    # 132 of them, whole, and as many more as there are bytes for.
    (_, of_words), _ = read_first(w, FewTokensTiling(4), nbytes=200 * 32 * (stage + 64))
    assert (of_words.rows, of_words.nbytes) == (200, 32 * stage)
    # 32 tiles of 128 columns, each by four blocks; all that there is.
    tiling = Tiling(64, 128, "alternate", splits=4)
    (_, of_words), *_ = read_first(prepared(4096, 14336, None), tiling, nbytes=128 * 4 * 3 * stage)
    assert of_words == FirstBytes(128, 112 * stage, 4, 28 * stage, 3 * stage)
    (_, of_words), *_ = read_first(prepared(4096, 14336, None), tiling, nbytes=2**40)
    assert of_words == FirstBytes(128, 112 * stage, 4, 28 * stage, 28 * stage)
    # A part of K that is not whole is left out.
    (_, of_words), *_ = read_first(prepared(4096, 9 * 128, None), tiling, nbytes=2**40)
    assert (of_words.ranges, of_words.nbytes) == (3, 3 * stage)
    assert read_first(w, tiling, nbytes=0) == ()


@needs_compiler
def test_stacked_weights_are_prefetched_where_they_lie():
    """Slices of a scanned stack stay pointers, though two kernels take them."""
    w = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), prepared(1024, 1024))
    copies = w.words.size * 4 // 3

    def layers(x, stack):
        def layer(x, w):
            return operations.quantized_matmul(x, w, BipolarFormat(8), None), None

        return jax.lax.scan(layer, x, stack)[0]

    x = jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16)
    program, report = sm90_compile.compile_for_h200(layers, x, w, ptx=True)
    assert report.text.count("cp.async.bulk.prefetch.L2") == 2  # words and terms
    assert report.spill_bytes == report.stack_bytes == 0
    assert program.memory_analysis().temp_size_in_bytes < copies

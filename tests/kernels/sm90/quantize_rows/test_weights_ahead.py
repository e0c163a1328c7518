"""The kernel that quantizes tokens prefetches weights: which bytes, and that no number depends on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.backend.expanded_planning import weights_to_prefetch
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.quantize_rows import weights_ahead as module
from bipolar_jax.kernels.sm90.quantize_rows.weights_ahead import prefetch_run, weights_ahead
from tests.kernels.sm90.quantize_rows.test_quantize_rows import a_prologue, assert_close, interpreted, numbers
from tests.support import sm90_compile, warpgroup_simulator

pytestmark = pytest.mark.usefixtures("clean_interpreter")
A8 = BipolarFormat(8)


@pytest.fixture(scope="module")
def weights():
    """Of 9 stages, the last of 64 elements; 256 columns."""
    return bj.quantize(jnp.asarray(numbers(1088, 250, jnp.float32)), 4, 0, group_size=64).prepare()


@pytest.mark.parametrize(("splits", "megabytes", "stages"), [(1, 14, 9), (1, 0.05, 2), (4, 14, 0), (2, 14, 4)])
def test_the_first_stages_of_every_split_of_all_parts_are_prefetched(splits, megabytes, stages, weights, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", int(megabytes * 10**6))
    ahead = weights_ahead(weights, splits)
    for array, runs in zip(ahead.arrays, ahead.runs, strict=True):
        touched = np.zeros(array.nbytes, np.int8)
        warpgroup_simulator.prefetched.clear()
        with monkeypatch.context() as patch:
            warpgroup_simulator.install(patch)
            for index in range(runs.count if runs.first_bytes else 0):
                prefetch_run(runs, np.asarray(array), warpgroup_simulator.int32(index))
        for start, size in warpgroup_simulator.prefetched:
            touched[start : start + size] += 1
        by_stage = touched.reshape(*array.shape[:3], -1)
        expected = np.zeros(9, np.int8)
        for split in range(splits):
            expected[split * -(-9 // splits) :][:stages] = 1
        np.testing.assert_array_equal(by_stage, np.broadcast_to(expected[:, None], by_stage.shape))


def test_tokens_are_the_same_with_weights_ahead(weights):
    """By more blocks than there are rows, with a norm's vector between the rows and the weights."""
    x, prologue = numbers(3, 96, jnp.bfloat16), a_prologue("rms", 96, jnp.float32)
    assert_close(interpreted(x, A8, "int8", prologue, blocks=5, ahead=weights_ahead(weights)), x, A8, "int8", prologue)


def test_few_tokens_have_weights_prefetched(weights):
    bfloat16 = jnp.dtype(jnp.bfloat16)
    assert weights_to_prefetch(65, weights, bfloat16) is None
    assert weights_to_prefetch(64, weights, bfloat16) is not None


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
def test_stacked_weights_are_prefetched_where_they_lie(monkeypatch):
    """A loop over layers copies none of them."""
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    w = jax.eval_shape(
        lambda: jax.vmap(lambda x: bj.quantize(x, 4, 0, group_size=128).prepare())(jnp.zeros((4, 1024, 512)))
    )

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x + bj.matmul(x, w, A8, implementation="sm90")[:, :1], None), x, w)[0]

    program, report = sm90_compile.compile_for_h200(layers, jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16), w, ptx=True)
    assert "cp.async.bulk.prefetch.L2.global" in report.text
    assert program.memory.temp_size_in_bytes < 512 * 1024 // 2
    assert report.spill_bytes == 0

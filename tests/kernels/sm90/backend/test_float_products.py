"""Float activations with prepared weights and integer groups on Hopper: whole products, plans, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.backend.float_products import weight_only_matmul
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.unsupported import Unsupported
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support.integer_products import normal, random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def groups(n: int, k: int, bits: int = 4, group_size: int = 32):
    fmt = BipolarFormat(bits)
    scale = np.random.default_rng(n).uniform(2.0**-11, 2.0**-10, n).astype(np.float32)
    return array_of_groups(random_groups(fmt, n, k, group_size), fmt, scale)


def codes(n: int, k: int, bits: int):
    fmt = BipolarFormat(bits)
    return array_of_codes(random_codes(fmt, n, k, 0), fmt, np.full(n, 2.0**-10, np.float32))


@pytest.mark.parametrize(
    ("m", "make_w", "dtype"),
    [
        (130, lambda: groups(140, 200), jnp.bfloat16),  # laid out within the call; ragged sizes
        (65, lambda: groups(130, 72, 3, 16).prepare(gated=True), jnp.float16),
        (130, lambda: codes(40, 136, 8).prepare(), jnp.bfloat16),
        (3, lambda: groups(140, 72).prepare(gated=True), jnp.bfloat16),
    ],
    ids=["packed groups", "gated, float16", "8 bits", "few tokens"],
)
@pytest.mark.sample(1)
def test_the_whole_product_is_that_of_dequantized_weights(m, make_w, dtype):
    w = make_w()
    k, n = w.shape
    x, bias = jnp.asarray(normal(m, k), dtype), jnp.asarray(normal(n))
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found = bj.matmul(x, w, None, bias=bias, implementation="sm90")
    assert not races_found()
    assert found.dtype == dtype
    wide, w_hat = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    expected, sizes = wide @ w_hat + np.asarray(bias), np.abs(wide) @ np.abs(w_hat) + np.abs(np.asarray(bias))
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert np.all(error <= float(jnp.finfo(dtype).eps) / 2 * np.abs(expected) + k * 2.0**-23 * sizes)


def test_few_tokens_are_activated_and_added_within_the_product(monkeypatch):
    """The numbers are those of a product in bfloat16 and two steps behind it."""
    activation, m, n, k = Activation("silu", gated=True), 2, 72, 128
    w = groups(n, k).prepare(gated=True)
    x, residual = jnp.asarray(normal(m, k), jnp.bfloat16), jnp.asarray(normal(m, n // 2), jnp.bfloat16)
    wide = jnp.asarray(np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64), jnp.bfloat16)
    expected = np.asarray(activation(wide).astype(jnp.bfloat16) + residual, np.float32)
    monkeypatch.setattr(epilogue, "activate_and_add", None)  # is not called
    with interpreted(plgpu.InterpretGPUParams()):
        found = weight_only_matmul(x, w, None, residual, activation)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-7, atol=2**-9)


def test_plans_are_explained():
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2048, 4096), (4096, 14336)))
    w = jax.eval_shape(lambda kernel: bj.quantize(kernel, 4, 0, 128, scales="integer"), kernel)
    with interpreted(plgpu.InterpretGPUParams()):
        packed, prepared = bj.explain(x, w, None), bj.explain(x, jax.eval_shape(lambda w: w.prepare(), w), None)
    for explained in (packed, prepared):
        assert explained.implementation == "sm90"
        weights = "weights of 4 bits in integer groups of 128 expanded to bfloat16 in registers"
        assert explained.kernel == f"bfloat16 tensor cores, {weights}"
    assert packed.reason.endswith("; lays the weights out in every call, prepare_for_inference once")
    with interpreted(plgpu.InterpretGPUParams()):
        few = bj.explain(jax.ShapeDtypeStruct((1, 4096), jnp.float16), w, None)
        tilings = [bj.explain(jax.ShapeDtypeStruct((m, 4096), jnp.bfloat16), w, None).tiling for m in (16, 64)]
    assert few.kernel == "float16 tensor cores, weights of 4 bits in integer groups of 128 expanded in registers"
    # `mma.sync` of 64 tokens would take longer than reading the weights.
    assert [type(tiling) for tiling in tilings] == [FewTokensTiling, Tiling]


def test_what_is_not_served_is_said():
    x = jnp.ones((2, 96), jnp.bfloat16)
    with interpreted(plgpu.InterpretGPUParams()):
        for dtype, w, message in (
            (jnp.float32, groups(64, 96), "must be bfloat16 or float16"),
            (jnp.bfloat16, groups(64, 96, group_size=24), "groups of a multiple of 16 elements can be prepared"),
        ):
            explained = bj.explain(x.astype(dtype), w, None)
            assert explained.implementation == "xla"
            assert message in explained.passed_over["sm90"]
            with pytest.raises(Unsupported, match=message):
                bj.matmul(x.astype(dtype), w, None, implementation="sm90")

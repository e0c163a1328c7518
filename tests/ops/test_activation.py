"""An activation of the product, within it: the numbers of one after it, its gradient, and errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarArray, matmul, quantize
from bipolar_jax.kernels.sm90.backend import operations
from bipolar_jax.kernels.sm90.backend.planning import Choice
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.ops import Activation, RMSNorm
from tests.support.backends import PORTABLE

K, N = 40, 12
SWIGLU = Activation("silu", gated=True)
ACTIVATIONS = [SWIGLU, Activation("gelu", gated=True), Activation("relu"), Activation("gelu")]


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(scope="module")
def w() -> BipolarArray:
    return quantize(normal(K, N, seed=1), 3, 0, 32, "minmax", scales="float")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("a_bits", [1, 8])
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.sample(2)
def test_it_is_of_the_float32_product_with_its_bias(w, implementation, a_bits, activation):
    """Before the cast: the bfloat16 result is the float32 one, rounded."""
    x = normal(2, 3, K, dtype=jnp.bfloat16)
    options = dict(
        bias=normal(N, seed=3), prologue=RMSNorm(1 + normal(K, seed=4) / 4, 1e-5), implementation=implementation
    )
    found = matmul(x, w, a_bits, activation=activation, **options)
    product = matmul(x.astype(jnp.float32), w, a_bits, **options)
    assert found.dtype == jnp.bfloat16
    # Compiled, as it is in the product: operation by operation GELU's tails differ in their last bits.
    np.testing.assert_array_equal(found, jax.jit(lambda y: activation(y).astype(jnp.bfloat16))(product))


@pytest.mark.parametrize("implementation", PORTABLE)
def test_of_float_activations_it_follows_the_cast(w, implementation):
    x = normal(3, K, dtype=jnp.bfloat16)
    product = matmul(x, w, None, implementation=implementation)
    found = matmul(x, w, None, activation=SWIGLU, implementation=implementation)
    np.testing.assert_array_equal(found, SWIGLU(product).astype(jnp.bfloat16))


def test_a_residual_is_added_to_what_it_makes(w):
    x, residual = normal(3, K), normal(3, N // 2, seed=2)
    found = matmul(x, w, 2, activation=SWIGLU, residual=residual)
    np.testing.assert_array_equal(found, residual + matmul(x, w, 2, activation=SWIGLU))


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("clean_interpreter")
@pytest.mark.parametrize(
    ("tiling", "dtype", "activation", "a_bits"),
    [
        (Tiling(128, 192, "alternate", slots=3), jnp.bfloat16, SWIGLU, 2),
        (Tiling(128, 128, "split_n", slots=2), jnp.bfloat16, Activation("gelu", gated=True), 8),
        (Tiling(64, 64, "alternate", slots=3), jnp.float16, SWIGLU, 1),
        (Tiling(64, 128, "split_m", slots=3, cluster_m=2), jnp.float32, SWIGLU, 2),
        (Tiling(128, 192, "alternate", slots=3), jnp.bfloat16, Activation("relu"), 2),
    ],
    ids=str,
)
@pytest.mark.covered("the kernel, by `make gpu-test` and kernels/sm90/gemm")
def test_the_hopper_kernel_applies_it_to_what_it_has_in_registers(monkeypatch, tiling, dtype, activation, a_bits):
    """Ragged in both directions: the last gates of a tile have others' columns beside them, which nobody reads."""
    columns = 2 * 203
    w = quantize(normal(K, columns, seed=1), 2, 0)
    x = normal(150, K, dtype=dtype)
    kind = "planes" if a_bits <= 2 else "int8"
    monkeypatch.setattr(operations, "plan_product", lambda *sizes, **options: Choice(kind, tiling, "this one"))
    options = dict(bias=normal(columns, seed=3), activation=activation)
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found = matmul(x, w, a_bits, implementation="sm90", **options)
    expected = matmul(x, w, a_bits, implementation="xla", **options)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    tolerance = 2 * float(jnp.finfo(dtype).eps)  # and 1 + tanh, which xla computes, loses what is below its eps
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=tolerance, atol=2e-5)


@pytest.mark.usefixtures("clean_interpreter")
@pytest.mark.parametrize(("m", "group_size"), [(3, None), (70, 32)])
@pytest.mark.sample(1)
def test_where_no_kernel_has_it_xla_does(m, group_size):
    """Few tokens; groups."""
    w = quantize(normal(K, 64, seed=1), 2, 0, group_size, scales="float")
    x = normal(m, K, dtype=jnp.bfloat16)
    with interpreted(plgpu.InterpretGPUParams()):
        found = matmul(x, w, 2, activation=SWIGLU, implementation="sm90")
    expected = matmul(x, w, 2, activation=SWIGLU, implementation="xla")
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("a_bits", [2, None])
def test_its_gradient_is_that_of_the_activation_after_the_product(w, a_bits):
    x, bias, cotangent = normal(3, K), normal(N, seed=2), normal(3, N // 2, seed=3)

    def within(x, bias, scale):
        product = matmul(x, dataclasses.replace(w, scale=scale), a_bits, bias=bias, activation=SWIGLU)
        return jnp.sum(product * cotangent)

    def after(x, bias, scale):
        return jnp.sum(SWIGLU(matmul(x, dataclasses.replace(w, scale=scale), a_bits, bias=bias)) * cotangent)

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, bias, w.scale) for f in (within, after))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batch_axes_of_w_are_mapped_over():
    w = quantize(normal(2, K, N, seed=1), 2, 1)
    x = normal(2, 5, K)
    np.testing.assert_allclose(matmul(x, w, 2, activation=SWIGLU), SWIGLU(matmul(x, w, 2)), rtol=1e-6, atol=1e-6)


def test_a_linear_layer_takes_one():
    layer = bj.nn.Linear(K, N, precision=bj.Precision.parse("W2A2"), rngs=nnx.Rngs(0))
    x = normal(4, K)
    np.testing.assert_array_equal(layer(x, activation=SWIGLU), SWIGLU(layer(x)))


def test_what_is_no_activation_or_does_not_divide_is_refused(w):
    with pytest.raises(ValueError, match="the activation must be an Activation, got function"):
        matmul(normal(3, K), w, 2, activation=lambda x: x)
    odd = quantize(normal(K, 7), 2, 0)
    with pytest.raises(ValueError, match="an even number of columns, half of them gates; got 7"):
        matmul(normal(3, K), odd, 2, activation=SWIGLU)
    with pytest.raises(ValueError, match=r"the product float32 of shape \(3, 6\): they must be the same"):
        matmul(normal(3, K), w, 2, activation=SWIGLU, residual=normal(3, N))

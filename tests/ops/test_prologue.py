"""Norms, activation functions and rotations before a product: one definition, every backend, gradients, layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.ops import Activation, LayerNorm, Prologue, RMSNorm, hadamard
from tests.compress.rotations.dense_rotations import dense
from tests.support.interpreter import races_found

M, K, N = 5, 44, 6
NAMES = ("rms", "layer", "silu gated", "gelu gated", "silu", "gelu", "relu", "rotated", "silu gated rotated")
every_prologue = pytest.mark.parametrize("name", NAMES)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(name: str, k: int = K, batch: tuple[int, ...] = ()) -> Prologue:
    gain, bias = jnp.asarray(1 + normal(*batch, k, seed=8) / 4), jnp.asarray(normal(*batch, k, seed=9))
    if name == "rms":
        return RMSNorm(gain, 1e-5)
    if name == "layer":
        return LayerNorm(gain, bias, 1e-5)
    if name == "rotated":
        return hadamard(k)
    function, *others = name.split()
    rotation = hadamard(k, block=4) if "rotated" in others else None
    return Activation(function, gated="gated" in others, rotation=rotation)


@pytest.fixture(scope="module")
def w() -> bj.BipolarArray:
    return bj.quantize(normal(K, N, seed=1), 3, 0, 32, "minmax", scales="float")


def rows_of(prologue: Prologue, *leading: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(normal(*leading, prologue.parts * K), dtype)


# The definition.


def logistic(x):
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    "silu": lambda x: x * logistic(x),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@every_prologue
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prologues_are_the_published_functions_in_float32(name, dtype):
    prologue = make(name)
    x = rows_of(prologue, 3, M, dtype=dtype)
    wide = np.asarray(x, np.float64)
    if name == "rms":
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(prologue.gain)
    elif name == "layer":
        centered = wide - wide.mean(-1, keepdims=True)
        expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        expected = expected * np.asarray(prologue.gain) + np.asarray(prologue.bias)
    elif name == "rotated":
        expected = wide @ dense(prologue)
    elif prologue.gated:
        expected = FUNCTIONS[prologue.function](wide[..., :K]) * wide[..., K:]
    else:
        expected = FUNCTIONS[prologue.function](wide)
    if name == "silu gated rotated":
        expected = expected @ dense(prologue.rotation)
    got = jax.jit(lambda x: prologue(x))(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("norm", [nnx.RMSNorm, nnx.LayerNorm])
def test_norms_are_those_of_flax(norm):
    layer = norm(K, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    layer.scale[...] = jnp.asarray(normal(K, seed=8))
    if norm is nnx.LayerNorm:
        layer.bias[...] = jnp.asarray(normal(K, seed=9))
        ours = LayerNorm(layer.scale[...], layer.bias[...], layer.epsilon)
    else:
        ours = RMSNorm(layer.scale[...], layer.epsilon)
    x = normal(M, K)
    np.testing.assert_allclose(ours(x), layer(x), rtol=1e-5, atol=1e-6)


# The product.


@every_prologue
@pytest.mark.parametrize("a_bits", [1, 2, 8, None])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.sample(2)
def test_the_product_is_that_of_what_the_prologue_gives(name, a_bits, implementation, w):
    prologue, bias = make(name), normal(N, seed=3)
    x = rows_of(prologue, 2, M)

    @jax.jit
    def run(x):
        apart = bj.matmul(prologue(x), w, a_bits, bias=bias, implementation=implementation)
        return bj.matmul(x, w, a_bits, bias=bias, prologue=prologue, implementation=implementation), apart

    together, apart = run(x)
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rms", "layer", "gelu", "rotated", "silu gated rotated"])
@pytest.mark.sample(2)
def test_hopper_kernels_give_what_xla_does(name):
    w, prologue = bj.quantize(normal(K, N, seed=1), 2, 0), make(name)
    x = rows_of(prologue, M)

    def run(implementation):
        return jax.jit(lambda x: bj.matmul(x, w, 4, prologue=prologue, implementation=implementation))(x)

    expected = run("xla")
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        np.testing.assert_allclose(run("sm90"), expected, rtol=1e-5, atol=1e-5)
    assert not races_found()


def test_nothing_is_rounded_to_the_dtype_of_x_before_it_is_quantized(w):
    prologue = make("silu gated")
    x = rows_of(prologue, M, dtype=jnp.bfloat16)
    run = jax.jit(lambda x: bj.matmul(x, w, 8, prologue=prologue))
    np.testing.assert_array_equal(run(x), run(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["rms", "layer", "silu gated"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.sample(2)
def test_every_matrix_of_a_stack_may_have_a_norm_of_its_own(name, own):
    stack, prologue = bj.quantize(normal(2, K, N, seed=1), 4, -2), make(name, batch=(2,) * own)
    x = rows_of(prologue, 2, M)
    together = bj.matmul(x, stack, 8, prologue=prologue)
    for i in range(2):
        w, one = jax.tree.map(lambda leaf, i=i: leaf[i], (stack, prologue if own else None))
        np.testing.assert_allclose(together[i], bj.matmul(x[i], w, 8, prologue=one or prologue), rtol=1e-5, atol=1e-5)


# Gradients.


@every_prologue
@pytest.mark.parametrize("a_bits", [2, 8, None])
@pytest.mark.sample(2)
def test_gradients_are_those_of_the_prologue_and_the_product_one_after_the_other(name, a_bits, w):
    prologue, cotangent = make(name), normal(2, M, N, seed=2)
    x = rows_of(prologue, 2, M)

    def fused(x, prologue):
        return jnp.sum(bj.matmul(x, w, a_bits, prologue=prologue) * cotangent)

    def apart(x, prologue):
        return jnp.sum(bj.matmul(prologue(x), w, a_bits) * cotangent)

    got, expected = (jax.jit(jax.grad(loss, argnums=(0, 1)))(x, prologue) for loss in (fused, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_gradients_of_a_prologue_have_its_dtypes(w):
    norm = LayerNorm(jnp.ones(K, jnp.bfloat16), jnp.zeros(K, jnp.float16), 1e-5)
    x = rows_of(norm, M, dtype=jnp.bfloat16)
    dx, dnorm = jax.grad(lambda x, p: bj.matmul(x, w, 8, prologue=p).astype(jnp.float32).sum(), argnums=(0, 1))(x, norm)
    assert (dx.dtype, dnorm.gain.dtype, dnorm.bias.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float16)


# Layers and errors.


def test_a_linear_layer_takes_a_prologue():
    layer = bj.nn.Linear(K, N, precision=bj.Precision.parse("W4A8"), rngs=nnx.Rngs(0))
    prologue = make("silu gated")
    x = rows_of(prologue, M)
    expected = bj.matmul(x, layer.kernel.get_value(), 8, bias=layer.bias[...], prologue=prologue)
    np.testing.assert_array_equal(layer(x, prologue), expected)


@pytest.mark.parametrize(
    ("prologue", "columns", "message"),
    [
        (RMSNorm(jnp.ones(K + 1), 1e-5), K, rf"RMSNorm.gain has shape \({K + 1},\), w needs \({K},\)"),
        (LayerNorm(jnp.ones(K), jnp.ones(K, jnp.int32), 1e-5), K, "LayerNorm.bias must be bfloat16.*got int32"),
        (Activation("silu", gated=True), K, rf"x's last axis must be 2 \* k = {2 * K}, gates first"),
        (Activation("silu"), 2 * K, rf"x's last axis must be k={K}"),
        (jax.nn.silu, K, "an RMSNorm, a LayerNorm, an Activation or a Hadamard, got"),
        (hadamard(K - 4), K, f"the prologue rotates {K - 4} numbers, w needs k={K}"),
    ],
)
def test_what_does_not_fit_is_said(prologue, columns, message, w):
    with pytest.raises(ValueError, match=message):
        bj.matmul(normal(M, columns), w, 8, prologue=prologue)


def test_functions_are_those_that_there_are():
    with pytest.raises(ValueError, match="one of silu, gelu, relu, got 'tanh'"):
        Activation("tanh")

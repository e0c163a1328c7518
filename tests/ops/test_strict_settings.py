"""Operations under JAX's strict settings and in 64 bits: the same numbers, in the same dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.ops import Activation, LayerNorm, lookup
from tests.support.integer_products import normal

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
X, W = normal(4, 32), normal(32, 16, seed=1)
VECTOR = normal(16, seed=2)
DENSE = (((1,), (0,)), ((), ()))


def everything() -> dict[str, jax.Array]:
    norm = LayerNorm(normal(32, seed=3), normal(32, seed=4), 1e-5)
    results = {}
    for calibration, group_size in (("minmax", 8), ("mse", None)):
        packed = bj.quantize(W, 4, 0, group_size, calibration)
        name = f"{calibration} {group_size}"
        results[f"{name} matmul"] = bj.matmul(X, packed, 8, bias=VECTOR, prologue=norm)
        results[f"{name} float"] = bj.matmul(X, packed, None, bias=VECTOR, activation=Activation("gelu"))
        results[f"{name} dequantize"] = packed.truncate(2).dequantize()
        results[f"{name} gradient"] = jax.grad(lambda x, w=packed: bj.matmul(x, w, 8, bias=VECTOR).sum())(X)
        dot_general = bj.DotGeneral(4, 8, group_size=group_size, calibration=calibration, clip_activations=3.0)
        results[f"{name} DotGeneral"] = jax.grad(lambda w, dot=dot_general: dot(X, w, DENSE).sum())(W)
    results["reference"] = bj.matmul(X, bj.quantize(W, 1, 0, calibration="absmean"), 2, implementation="reference")
    results["lookup"] = lookup(bj.quantize(X, 4, -1), jnp.arange(3))
    results["bfloat16"] = bj.matmul(X.astype(jnp.bfloat16), bj.quantize(W, 4, 0), 8)
    stochastic = bj.DotGeneral(4, 8, gradient=bj.GradientPrecision(bits=4), weight_norm="standardize")
    key = jax.random.key(0)
    results["stochastic"] = jax.grad(lambda x: stochastic(x, W, DENSE, key=key).sum())(X)
    return results


@pytest.fixture(scope="module")
def expected():
    return everything()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_numbers_are_those_of_the_default_settings(setting, expected):
    with SETTINGS[setting]():
        found = everything()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        if name != "stochastic" or setting != "x64":  # random numbers differ in 64 bits
            np.testing.assert_allclose(np.float32(found[name]), np.float32(array), rtol=1e-5, atol=1e-5, err_msg=name)

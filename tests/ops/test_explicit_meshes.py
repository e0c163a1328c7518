"""Products, lookups and their gradients with operands on a mesh of Explicit axes, which is JAX's default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from tests.support.integer_products import normal

DENSE = (((1,), (0,)), ((), ()))
X, W = normal(4, 32), normal(32, 6, seed=1)
PACKED = bj.quantize(W, 4, axis=0, group_size=8)
SQUARE = bj.quantize(normal(32, 32), 4, axis=0)

OPERATIONS = {
    "matmul": (lambda x, w, ids: bj.matmul(x, PACKED, 8), ("data", None)),
    "weight only": (lambda x, w, ids: bj.matmul(x, PACKED, None, bias=jnp.ones(6)), ("data", None)),
    "residual": (lambda x, w, ids: bj.matmul(x, SQUARE, 8, residual=x), ("data", None)),
    "DotGeneral": (lambda x, w, ids: bj.DotGeneral(4, 8)(x, w, DENSE), ("data", None)),
    "lhs": (lambda x, w, ids: bj.DotGeneral(4, 8, weights="lhs")(w.T, x.T, DENSE), (None, "data")),
    "packed": (lambda x, w, ids: bj.matmul(x, bj.quantize(w, 4, axis=0), 8), ("data", None)),
    "fake_quant": (lambda x, w, ids: x @ bj.fake_quant(w, 4, axis=0, calibration="mse"), ("data", None)),
    "truncated": (lambda x, w, ids: bj.matmul(x, bj.quantize(w, 4, axis=0).truncate(2), 8), ("data", None)),
    "lookup": (lambda x, w, ids: bj.lookup(SQUARE.T, ids), ("data", None)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.sample(2)
def test_operands_may_be_sharded(name):
    operation, axes = OPERATIONS[name]
    mesh, ids = jax.make_mesh((2,), ("data",)), jnp.arange(4)
    expected = operation(X, W, ids)
    with jax.set_mesh(mesh):
        x, w, ids = (jax.device_put(a, jax.P(*axes)) for a, axes in ((X, ("data", None)), (W, ()), (ids, ("data",))))
        for found in (operation(x, w, ids), jax.jit(operation)(x, w, ids)):
            assert jax.typeof(found).sharding.spec == jax.P(*axes)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w_axes", [(), (None, "data"), ("data", None)], ids=str)
def test_gradients_have_the_sharding_of_what_they_are_of(w_axes):
    def loss(x, w):
        return jnp.sum(bj.DotGeneral(4, 8)(x, w, DENSE) ** 2)

    expected = jax.grad(loss, argnums=(0, 1))(X, W)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        x, w = jax.device_put(X, jax.P("data", None)), jax.device_put(W, jax.P(*w_axes))
        found = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w)
        for gradient, operand, wanted in zip(found, (x, w), expected, strict=True):
            assert jax.typeof(gradient).sharding.spec == jax.typeof(operand).sharding.spec
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)

"""Gradients of matmul under shard_map are those of one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bipolar_jax as bj

MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 48)).astype(np.float32)
W = bj.quantize(RNG.standard_normal((48, 6)).astype(np.float32), 4, 0, 16, "minmax", scales="float")


def loss(x, scale, a_bits):
    return jnp.sum(bj.matmul(x, dataclasses.replace(W, scale=scale), a_bits) ** 2)


@pytest.mark.parametrize("a_bits", [8, None])
@pytest.mark.sample(1)
def test_data_parallel(a_bits):
    """x sharded, weights replicated: the gradient of the scales is summed over devices."""
    sharded = jax.shard_map(
        lambda x, scale: jax.lax.psum(loss(x, scale, a_bits), "d"), mesh=MESH, in_specs=(P("d"), P()), out_specs=P()
    )
    found = jax.jit(jax.grad(sharded, argnums=(0, 1)))(X, W.scale)
    expected = jax.grad(lambda x, scale: loss(x, scale, a_bits), argnums=(0, 1))(X, W.scale)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("a_bits", [8, None])
@pytest.mark.sample(1)
def test_tensor_parallel(a_bits):
    """Weights sharded along n, x replicated: the gradient of x is summed over devices."""
    specs = dataclasses.replace(W, planes=P(None, "d"), scale=P("d"), offset=P("d"), row_sums=P("d"))
    sharded = jax.shard_map(
        lambda x, w: jax.lax.psum(jnp.sum(bj.matmul(x, w, a_bits) ** 2), "d"),
        mesh=MESH,
        in_specs=(P(), specs),
        out_specs=P(),
    )
    found = jax.jit(jax.grad(sharded))(X, W)
    expected = jax.grad(lambda x: loss(x, W.scale, a_bits))(X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))

"""Eager calls compile one program for each shape, and none again; programs that close over weights trace."""

import dataclasses
import functools
import resource

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import bipolar_jax as bj
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.ops import Activation, RMSNorm, lookup
from tests.support.integer_products import normal

DENSE = (((1,), (0,)), ((), ()))
X, W = normal(4, 32), normal(32, 16, seed=1)
PACKED = bj.quantize(W, 4, axis=0)
GROUPED = bj.quantize(W, 4, axis=0, group_size=8, calibration="minmax", scales="float")
W4A8 = bj.Precision.parse("W4A8")
LINEAR = bj.nn.Linear(32, 16, precision=W4A8, rngs=nnx.Rngs(0))
EMBED = bj.nn.Embed(16, 32, precision=W4A8, rngs=nnx.Rngs(0))
TRAINED = nnx.Linear(32, 16, dot_general=bj.DotGeneral(4, 8), rngs=nnx.Rngs(0))
DOT = bj.DotGeneral(4, 8)
STACK = bj.quantize(normal(2, 32, 16), 4, axis=1)
DENSE_LAYER = linen.Dense(16, dot_general=DOT)
VARIABLES = {"params": {"kernel": jnp.asarray(W), "bias": jnp.zeros(16)}}


@functools.cache
def packed_linen():
    return bj.quantize_model(linen.Dense(16), [(".*", W4A8)], VARIABLES, X)


@functools.cache
def model():
    config = TransformerConfig(
        vocab_size=16,
        hidden_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        ffn_size=16,
        context_length=8,
    )
    return random_packed(config, W4A8, key=jax.random.key(0), dtype=jnp.float32)


EAGER = {
    "matmul": lambda: bj.matmul(X, PACKED, 8),
    "weight only": lambda: bj.matmul(X, PACKED, None),
    "groups": lambda: bj.matmul(X, GROUPED, 8, bias=jnp.ones(16)),
    "fused": lambda: bj.matmul(
        X, PACKED, 8, prologue=RMSNorm(jnp.ones(32, jnp.float32), 1e-5), activation=Activation("silu", True)
    ),
    "stack": lambda: bj.matmul(normal(2, 4, 32), STACK, 8),
    "reference": lambda: bj.matmul(X, PACKED, 8, implementation="reference"),
    "gradient of matmul": lambda: jax.grad(lambda x: bj.matmul(x, PACKED, 8).sum())(X),
    "gradient of scales": lambda: jax.grad(
        lambda scale: bj.matmul(X, dataclasses.replace(PACKED, scale=scale), 8).sum()
    )(PACKED.scale),
    "quantize": lambda: bj.quantize(W, 4, axis=0),
    "least squares": lambda: bj.quantize(W, 4, axis=0, calibration="mse"),
    "from_codes": lambda: bj.from_codes(jnp.ones((32, 16), int), 4, 0, jnp.ones((16, 1))),
    "dequantize": lambda: GROUPED.dequantize(),
    "values": lambda: PACKED.values(),
    "truncate": lambda: PACKED.truncate(2),
    "lookup": lambda: lookup(PACKED.T, jnp.arange(3)),
    "fake_quant": lambda: bj.fake_quant(W, 4, axis=0, calibration="mse"),
    "gradient of fake_quant": lambda: jax.grad(lambda w: bj.fake_quant(w, 4, axis=0, calibration="mse").sum())(W),
    "DotGeneral": lambda: bj.DotGeneral(4, 8, group_size=8)(X, W, DENSE),
    "gradient of DotGeneral": lambda: jax.grad(lambda w: bj.DotGeneral(4, 8)(X, w, DENSE).sum())(W),
    "Linear": lambda: LINEAR(X),
    "Embed": lambda: EMBED(jnp.arange(3)),
    "attend": lambda: EMBED.attend(X),
    "trained": lambda: TRAINED(X),
    "gradient of a layer": lambda: nnx.grad(lambda layer: layer(X).sum())(TRAINED),
    "linen": lambda: DENSE_LAYER.apply(VARIABLES, X),
    "gradient of linen": lambda: jax.grad(lambda variables: DENSE_LAYER.apply(variables, X).sum())(VARIABLES),
    "packed linen": lambda: packed_linen()[0].apply(packed_linen()[1], X),
    "model(ids)": lambda: model()(jnp.zeros((1, 4), jnp.int32)),
    "unpacked": lambda: bj.matmul(X, GROUPED.unpack(), 8),
    "packed after training": lambda: bj.nn.Linear.from_float(TRAINED)(X),
}

_compilations = []


def _count(event, duration, **_):
    if "backend_compile" in event:
        _compilations.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations_of(call) -> int:
    """Programs that a third call compiles."""
    call(), call()
    before = len(_compilations)
    jax.block_until_ready(call())
    return len(_compilations) - before


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.sample(2)
def test_no_call_compiles_again(name):
    assert compilations_of(EAGER[name]) == 0


def test_compilations_are_counted():
    assert compilations_of(lambda: jax.jit(lambda x: x + 1)(X)) == 1


@pytest.mark.parametrize("call", [lambda: LINEAR(X), lambda: TRAINED(X)], ids=["packed", "trained"])
def test_calls_leave_no_memory_behind(call):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    for _ in range(100):
        call()
    before = peak()
    for _ in range(2000):
        call()
    assert peak() - before < 8  # MB


CLOSED_OVER = {
    "quantize": lambda x: bj.matmul(x, bj.quantize(W, 4, axis=0), 8),
    "from_codes": lambda x: bj.matmul(x, bj.from_codes(jnp.ones((32, 16), int), 4, 0, jnp.ones((16, 1))), 8),
    "fake_quant": lambda x: x @ bj.fake_quant(W, 4, axis=0),
    "DotGeneral": lambda x: bj.DotGeneral(4, 8)(x, W, DENSE),
    "the other operand": lambda x: bj.DotGeneral(4, 8, weights="lhs")(W.T, x.T, DENSE).T,
}


@pytest.mark.parametrize("name", CLOSED_OVER)
@pytest.mark.sample(2)
def test_traced_functions_close_over_weights(name):
    function = CLOSED_OVER[name]
    expected = function(X)
    traced = {
        "jit": jax.jit(function)(X),
        "scan": jax.lax.scan(lambda carry, x: (carry, function(x)), None, X[None])[1][0],
        "map": jax.lax.map(function, X[None])[0],
        "while": jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, function(X)), (0, expected * 0))[1],
        "cond": jax.lax.cond(jnp.bool_(True), function, lambda x: expected * 0, X),
    }
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    traced["shard_map"] = jax.shard_map(function, mesh=one, in_specs=jax.P(), out_specs=jax.P())(X)
    for how, found in traced.items():
        assert jnp.allclose(found, expected, rtol=1e-6, atol=1e-6), how


@pytest.mark.parametrize("name", ["quantize", "DotGeneral"])
def test_what_a_traced_function_closes_over_is_checked(name):
    weights = jnp.asarray(W) * jnp.inf
    calls = {"quantize": lambda: bj.quantize(weights, 4, axis=0), "DotGeneral": lambda: DOT(X, weights, DENSE)}
    with pytest.raises(ValueError, match="NaN or Inf"):
        jax.jit(calls[name])()


@pytest.mark.parametrize("a_bits", [8, None])
def test_an_empty_batch_gives_an_empty_result(a_bits):
    x = jnp.zeros((2, 0, 32))
    assert bj.matmul(x, PACKED, a_bits, bias=jnp.ones(16)).shape == (2, 0, 16)
    assert bj.matmul(x, PACKED, a_bits, activation=Activation("silu", gated=True)).shape == (2, 0, 8)
    assert bj.matmul(x, STACK, a_bits).shape == (2, 0, 16)
    assert LINEAR(x).shape == (2, 0, 16)
    assert EMBED.attend(x).shape == (2, 0, 16)
    assert EMBED(jnp.zeros((0,), int)).shape == (0, 32)
    assert bj.nn.Linear.from_float(TRAINED)(x).shape == (2, 0, 16)
    assert bj.fake_quant(x, 4, axis=-1).shape == (2, 0, 32)
    assert jax.grad(lambda bias: bj.matmul(x, PACKED, a_bits, bias=bias).sum())(jnp.ones(16)).tolist() == [0] * 16

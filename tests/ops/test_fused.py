"""Fused operations: backends offer the whole contract, plans refuse as operations do, and errors are no refusals."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import ops
from bipolar_jax.kernels.backend import Backend, Layer
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks import attention, feed_forward, prompt_heads
from bipolar_jax.ops import dispatch
from bipolar_jax.ops.pack_weights import pack_weights

CONTRACT = {name: member for name, member in vars(Backend).items() if inspect.isfunction(member) and name[0] != "_"}
ONE_BIT = bj.BipolarFormat(1)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_backend_offers_the_whole_contract(backend):
    assert set(CONTRACT) <= set(dispatch.BACKENDS[backend].__all__)


@pytest.mark.parametrize("name", CONTRACT)
def test_hopper_takes_the_operands_of_the_contract(name):
    expected = list(inspect.signature(CONTRACT[name]).parameters.values())[1:]
    found = inspect.signature(getattr(sm90, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected]


def one_bit_layers(bits: int = 1):
    up, down = (bj.quantize(jnp.ones(shape), 1, 0) for shape in ((64, 192), (96, 64)))
    x = jnp.zeros((70, 64), jnp.bfloat16)
    activation = ops.Activation("silu", gated=True)
    return x, Layer(up, ONE_BIT, None), Layer(down, bj.BipolarFormat(bits), None), None, activation, x


def heads(length: int = 70):
    w = bj.quantize(jnp.ones((64, 256)), 4, 0)
    cache = jnp.zeros((2, 2, 1, 128, 64), jnp.bfloat16)
    return jnp.zeros((2, length, 64), jnp.bfloat16), w, bj.BipolarFormat(8), None, None, cache, cache, jnp.int32(0)


def token(capacity: int = 64):
    cache = (jnp.zeros((2, 1, 2, capacity, 32), jnp.bfloat16),)
    return (jnp.zeros((1, 6, 32), jnp.bfloat16),), cache, cache, jnp.int32(0), jnp.zeros(1, jnp.int32)


def test_fused_operations_are_explained():
    with interpreted(plgpu.InterpretGPUParams()):
        explained = bj.explain(ops.prompt_heads, *heads())
        assert explained.implementation == "sm90"
        assert explained.kernel == "int8 tensor cores, weights expanded from 4 planes, heads written to the cache"
        assert "leaves one bit a number; then binary" in bj.explain(ops.feed_forward, *one_bit_layers()).kernel
        explained = bj.explain(ops.decode_attention, *token(), bits=None)
        assert explained.kernel.startswith("one pass over a bfloat16 cache")
        assert explained.tiling.capacity == 64


@pytest.mark.parametrize(
    ("operation", "operands", "reason"),
    [
        (ops.prompt_heads, heads(63), "prompts of 63 tokens do not fill tiles of 64"),
        (ops.feed_forward, one_bit_layers(2), "signs are tokens of one bit, not 2"),
        (ops.decode_attention, token(40), "capacity must be a multiple of 64, not 40"),
    ],
)
def test_an_explanation_refuses_as_the_operation(operation, operands, reason):
    with interpreted(plgpu.InterpretGPUParams()):
        for ask in (operation, lambda *operands: bj.explain(operation, *operands)):
            with pytest.raises(Unsupported, match=reason):
                ask(*operands)


def test_what_cannot_be_explained_is_named():
    w = bj.quantize(jnp.ones((32, 4)), 4, 0)
    with pytest.raises(
        ValueError, match=r"sin is no operation of bipolar_jax\.ops\.fused: give one, or x, w and a_bits"
    ):
        bj.explain(jnp.sin, w)
    with pytest.raises(TypeError, match=r"explain\(x, w, a_bits\) needs w and a_bits"):
        bj.explain(jnp.ones((1, 32)), w)
    with pytest.raises(ValueError, match=r"x must be an array, or a jax.ShapeDtypeStruct .*, got \[1.0\]"):
        bj.explain([1.0], w, 8)


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference", "sm90"])
@pytest.mark.parametrize(
    ("operation", "operands"),
    [
        (ops.prompt_heads, heads()),
        (ops.feed_forward, one_bit_layers()),
        (ops.decode_attention, token()),
        (ops.decode_layers, [None] * 11),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_a_hopper_gpu_no_backend_fuses(operation, operands, implementation):
    with pytest.raises(Unsupported, match=f"no backend can serve {operation.__name__}: "):
        operation(*operands, implementation=implementation)


def test_wrong_operands_are_the_callers_error():
    x, w, *others = heads()
    with pytest.raises(ValueError, match="k=64"):
        ops.prompt_heads(x[..., :-1], w, *others)
    with pytest.raises(ValueError, match="k=64"):
        bj.explain(ops.prompt_heads, x[..., :-1], w, *others)
    x, up, down, prologue, activation, residual = one_bit_layers()
    with pytest.raises(ValueError, match="residual"):
        ops.feed_forward(x, up, down, prologue, activation, residual[:-1])
    with pytest.raises(ValueError, match="must be one of auto, reference, sm90, xla; got 'gpu'"):
        ops.decode_attention(*token(), implementation="gpu")


def broken(*operands, **options):
    raise NotImplementedError("Mosaic cannot lower this")


class Broken:
    """A backend of which everything fails with an error that is no refusal."""

    def __getattr__(self, name):
        return broken


@pytest.mark.parametrize("implementation", ["auto", "sm90"])
def test_an_error_inside_a_backend_is_no_refusal(monkeypatch, implementation):
    monkeypatch.setitem(dispatch.BACKENDS, "sm90", Broken())
    x, w = jnp.ones((2, 64)), bj.quantize(jnp.ones((64, 8)), 4, 0)
    calls = [
        lambda: bj.matmul(x, w, 8, implementation=implementation),
        lambda: bj.matmul(x, w, None, implementation=implementation),
        lambda: bj.explain(x, w, 8, implementation=implementation),
        lambda: pack_weights(jnp.ones((64, 8)), ONE_BIT, jnp.ones((8, 1)), implementation=implementation),
        lambda: ops.decode_attention(*token(), implementation=implementation),
        lambda: bj.explain(ops.prompt_heads, *heads(), implementation=implementation),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="Mosaic cannot lower this") as error:
            call()
        assert not isinstance(error.value, Unsupported)


def test_models_do_not_hide_an_error_inside_a_backend(monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "sm90", Broken())
    cache = attention.KVCache(*(jnp.zeros((2, 1, 2, 64, 32)),) * 2, jnp.zeros(1, jnp.int32))
    with pytest.raises(NotImplementedError, match="Mosaic"):
        attention.attend_to_cache((jnp.zeros((1, 1, 6, 32)),), cache, jnp.int32(0))
    layers = {"precision": bj.Precision.parse("W1A1"), "use_bias": False, "rngs": nnx.Rngs(0)}
    gate_up, down = bj.nn.Linear(64, 192, **layers), bj.nn.Linear(96, 64, **layers)
    norm = nnx.RMSNorm(64, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="Mosaic"):
        feed_forward._one_bit_down(jnp.ones((1, 70, 64)), norm, gate_up, down, feed_forward.gate_activation("swiglu"))
    projections = prompt_heads.Projections([bj.nn.Linear(64, 128, **layers)], norm, jnp.ones((1, 70, 64)), 32)
    with pytest.raises(NotImplementedError, match="Mosaic"):
        prompt_heads.prompt_heads(projections, 1, None, cache, jnp.int32(0))

"""Attention where heads share their keys by fours: a head for each warpgroup, and a chunk of the cache for all."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import Cache
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import in_phase
from bipolar_jax.kernels.sm90.decode_step.launch import _launch
from bipolar_jax.kernels.sm90.decode_step.phases import LayersWeights, buffers_of
from tests.kernels.sm90.decode_step.layers_twin import EPS, SWIGLU, Case, check_layers
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

SHARED = Case(1, 128, 128, 4, 1, 4, 8, 640, 600, prepared=True, group_size=64, head_dim=64)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (SHARED, 5),  # three chunks for some of four blocks
        # Two heads of keys, blocks without a chunk, two layers through the same slots.
        (dataclasses.replace(SHARED, layers=2, heads=8, kv_heads=2, capacity=192, length=130, cache_bits=8), 9),
        (dataclasses.replace(SHARED, head_dim=128, capacity=320, length=320, cache_bits=4, rotates_keys=True), 4),
        (dataclasses.replace(SHARED, texts=2, capacity=128, length=100), 8),  # a team of heads for each text
    ],
)
@pytest.mark.covered("the kernel, by `make gpu-test` on llama-3-8b; the phases, by test_heads_attend_together")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


HEADS, SIZE, LENGTH, CAPACITY = 4, 64, 300, 320


@pytest.mark.parametrize("blocks", [4, 5])
@pytest.mark.sample(1)
def test_heads_attend_together(blocks):
    """Attention and its combination alone: five chunks over four blocks, and a new token whose heads have norms."""
    rng = np.random.default_rng(0)
    shape = LayersShape(
        num_layers=1, hidden=128, ffn=128, heads=HEADS, kv_heads=1, head_dim=SIZE, a_format=BipolarFormat(8),
        w_format=BipolarFormat(2), norm="rms", norm_eps=EPS, activation=SWIGLU, blocks=blocks, head_norm_eps=0.3,
    )  # fmt: skip
    assert (shape.heads_at_once, shape.chunks_at_once, shape.splits) == (4, 1, blocks)
    keys, values = (jnp.asarray(rng.standard_normal((1, 1, 1, CAPACITY, SIZE)), jnp.bfloat16) for _ in range(2))
    qkv = jnp.asarray(rng.standard_normal((HEADS + 2) * SIZE), jnp.float32)
    gains = {name: (jnp.asarray(rng.uniform(0.5, 1.5, SIZE), jnp.float32),) for name in ("queries", "keys")}
    angles = rng.uniform(-3, 3, SIZE // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    tables = (jnp.asarray(np.tile(np.concatenate(halves), 2), jnp.float32) for halves in ((cos, cos), (-sin, sin)))
    cache = Cache(keys, values, jnp.array([LENGTH], jnp.int32), *tables)
    buffers = jax.tree.map(lambda buffer: jnp.zeros(buffer.shape, buffer.dtype), buffers_of(shape))
    buffers = buffers._replace(qkv=in_phase(qkv, 1))
    for phase, name in (("attention", "partials"), ("combine", "context")):
        operands = (LayersWeights({}, gains), cache, buffers.hidden, buffers, jnp.zeros(1, jnp.int32))
        after, _ = _launch(shape, *operands, (phase,), plgpu.InterpretGPUParams(detect_races=True))
        assert not races_found()
        buffers = buffers._replace(**{name: getattr(after, name)})
    q, k, v = np.split(np.asarray(qkv, np.float64).reshape(-1, SIZE), [HEADS, HEADS + 1])

    def rotated(heads, name):
        heads = (
            heads / np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 0.3) * np.asarray(gains[name][0], np.float64)
        )
        a, b = np.split(heads, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = rotated(q, "queries"), rotated(k, "keys")
    all_keys, all_values = (
        np.concatenate([np.asarray(old[0, 0, 0, :LENGTH], np.float64), np.asarray(jnp.asarray(new, jnp.bfloat16))])
        for old, new in ((keys, k), (values, v))
    )
    weights = np.exp(q @ all_keys.T / np.sqrt(SIZE))
    expected = weights @ all_values / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(buffers.context.reshape(HEADS, SIZE), expected, atol=1e-5)

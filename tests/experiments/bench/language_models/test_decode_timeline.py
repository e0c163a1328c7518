"""The timeline of the decode step: what is summed up from readings of the clock, and the kernel that takes them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import Precision
from bipolar_jax.kernels.sm90.decode_step.api import decode_layers, plan_decode_layers
from bipolar_jax.kernels.sm90.decode_step.cooperative.timeline import MARKS, split_timeline, timeline_type
from bipolar_jax.kernels.sm90.decode_step.phases import PHASES
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.random_weights import random_packed
from experiments.bench.language_models import decode_timeline
from tests.support import sm90_compile

CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=128, num_layers=6, num_heads=2, num_kv_heads=1, head_dim=128, ffn_size=256,
    context_length=128,
)  # fmt: skip


@functools.cache
def operands():
    """Shapes of a small model's arrays, and static arguments."""
    static = []

    def arrays():
        model = random_packed(CONFIG, Precision.parse("W4A8g64i"), key=jax.random.key(0), embed_bits=None)
        found, options = decode_timeline.operands_of(prepare_for_inference(model, layout="tensor_cores"), 70, 0)
        static.append(options)
        return found

    return jax.eval_shape(arrays), static[0]


def test_the_tables_are_those_of_the_readings():
    """Blocks whose clocks begin apart, at 2 GHz. A phase takes 1200 ns; one block is 400 later than others."""
    blocks, layers = 3, CONFIG.num_layers
    marks = np.tile(100 * np.arange(1, len(MARKS) + 1), (blocks, 1))
    marks[2, MARKS.index("multiplied") :] += 400
    phases = 10_000 + 1200 * np.arange(layers * len(PHASES)).reshape(layers, -1)
    ns = np.broadcast_to(
        phases[None, None, ..., None] + marks[:, None, None, None], (blocks, 4, layers, len(PHASES), len(MARKS))
    )
    entered, offset = np.array([1000, 1200, 900]), np.array([7, 10**9, 2**32 - 50])
    ends_ns = np.stack([entered, entered + 10**6], axis=-1)  # [blocks, enter or leave]
    ends = np.stack([2 * (ends_ns - entered[:, None]) + offset[:, None], 2**32 - 2000 + ends_ns], axis=-1)
    ends = np.broadcast_to((ends % 2**32)[:, None], (blocks, 4, 2, 2)).astype(np.uint32)
    clocks = 2 * (ns - entered.reshape(-1, 1, 1, 1, 1)) + offset.reshape(-1, 1, 1, 1, 1)
    clocks = np.concatenate([clocks, np.full((*clocks.shape[:-1], 1), 90)], axis=-1) % 2**32
    found = decode_timeline.summary(clocks.astype(np.uint32), ends, dict.fromkeys(PHASES, np.arange(blocks)))
    assert found["clock_ghz"] == 2
    assert found["timer_ns"] == 100
    assert found["step_us"] == 1000
    of_product = {
        "phase": 1.2, "spread": 0.4, "prepare": 0.6, "own block": 0.1, "others": 0.1, "token": 0.1, "multiply": 0.1,
        "meet": 0.1, "finish": 0.1, "hop": 0.4, "waiting": 0.045,
    }  # fmt: skip
    for name in ("qkv", "attention", "o", "up", "down"):
        assert found["phases"][name] == pytest.approx(of_product), name
    assert found["phases"]["combine"] == pytest.approx({"phase": 1.2, "spread": 0.4, "finish": 0.5})


def test_blocks_without_rows_are_left_out():
    arrays, static = operands()
    shape = plan_decode_layers(**arrays, **static).tiling
    active = decode_timeline.active_blocks(dataclasses.replace(shape, blocks=5))
    # 512 projections are 16 parts of 32, of which four blocks take 4 each; heads are two blocks' each.
    assert {name: len(blocks) for name, blocks in active.items()} == {
        "qkv": 4, "attention": 4, "combine": 4, "o": 4, "up": 4, "down": 4,
    }  # fmt: skip


def test_readings_of_small_layers():
    shape = plan_decode_layers(**operands()[0], **operands()[1]).tiling
    kind = timeline_type(shape, len(PHASES))
    clocks, ends = split_timeline(np.arange(kind.shape[0]), shape.num_layers, len(PHASES))
    assert clocks.shape == (shape.blocks, 4, 6, len(PHASES), len(MARKS) + 1)
    assert ends.shape == (shape.blocks, 4, 2, 2)
    arrays, static = operands()
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arrays)
    with pytest.raises(ValueError, match="interpret mode has no clock"):
        decode_layers(**arrays, **static, blocks=4, timed=True, interpret=plgpu.InterpretGPUParams())


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.covered("the kernel without readings, by kernels/sm90/decode_step")
def test_the_kernel_with_readings_compiles():
    arrays, static = operands()
    _, report = sm90_compile.compile_for_h200(
        lambda arrays: decode_layers(**arrays, **static, timed=True), arrays, ptx=True
    )
    assert report.spill_bytes == 0
    assert report.text.count("%globaltimer_lo") == 2

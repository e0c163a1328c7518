"""Heads of prompts on Hopper: against XLA's, with no races, compiled without spills; a model that reads them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sm90_compile
from flax import nnx
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90 import execution
from bipolar_jax.kernels.sm90.prompts import prompt_heads
from bipolar_jax.models import attention
from bipolar_jax.models.cache import KVCache
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer

pytestmark = pytest.mark.timeout(240)  # a kernel that deadlocks waits for ever

LAYERS, LAYER = 2, 1


@pytest.fixture(autouse=True)
def clean_interpreter():
    yield  # an error leaves its state behind
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: what the kernel is given, but for the numbers."""

    length: int
    capacity: int
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    dtype: type = jnp.float32
    rope: bool = True
    joined: bool = True

    def make(self) -> tuple[attention.Projected, KVCache, tuple[jax.Array, jax.Array] | None]:
        """What was projected, a cache full of other numbers, and the tables."""
        rng = np.random.default_rng(0)

        def normal(*shape, dtype=self.dtype):
            return jnp.asarray(rng.standard_normal(shape), dtype)

        parts = (self.heads, self.kv_heads, self.kv_heads)
        projected = tuple(
            normal(self.batch, self.length, heads, self.head_dim) for heads in ((sum(parts),) if self.joined else parts)
        )
        kept = (normal(LAYERS, self.batch, self.kv_heads, self.capacity, self.head_dim) for _ in range(2))
        angles = normal(self.batch, self.length, self.head_dim // 2, dtype=jnp.float32)
        tables = (jnp.cos(angles), jnp.sin(angles)) if self.rope else None
        return projected, KVCache(*kept, jnp.full(self.batch, self.length)), tables


CASES = {
    "whole runs": Case(64, 96),
    "no room left": Case(64, 64),
    "ragged": Case(77, 130, batch=2),
    "shorter than a run": Case(3, 5),
    "one token": Case(1, 64),
    "mostly room": Case(2, 200),
    "grouped": Case(40, 64, heads=9, kv_heads=3, dtype=jnp.bfloat16),
    "one key head": Case(33, 40, heads=6, kv_heads=1, head_dim=64),
    "not joined": Case(50, 64, batch=3, heads=5, kv_heads=1, joined=False),
    "no tables": Case(45, 64, rope=False, dtype=jnp.bfloat16, batch=2),
    "no tables, not joined": Case(45, 64, heads=6, kv_heads=2, head_dim=24, rope=False, joined=False),
    "wide": Case(40, 64, heads=2, kv_heads=1, head_dim=256),
    "odd sizes": Case(40, 64, heads=2, kv_heads=1, head_dim=80, dtype=jnp.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_heads_are_rotated_and_fill_the_cache(case):
    projected, cache, tables = case.make()
    with execution.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found, kept = attention._enter_on_sm90(projected, cache, jnp.int32(LAYER), tables)
    assert not interpret_pallas_call.get_races().races_found
    expected = attention.rotated_heads(projected, case.kv_heads, tables)
    written = cache.write_prompts(LAYER, *expected[1:])
    rounding = float(jnp.finfo(case.dtype).eps)
    for a, b in zip((*found, kept.keys, kept.values), (*expected, written.keys, written.values), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        # Products may be rounded before they are added, or not, and so the result to the next number.
        np.testing.assert_allclose(a, b, rtol=2 * rounding if case.rope else 0, atol=1e-6 if case.rope else 0)
    for a, old in ((kept.keys, cache.keys), (kept.values, cache.values)):
        np.testing.assert_array_equal(a[0], old[0])
        assert not a[LAYER, :, :, case.length :].any()
    np.testing.assert_array_equal(found[2], expected[2])
    np.testing.assert_array_equal(kept.keys[LAYER, :, :, : case.length], jnp.swapaxes(found[1], 1, 2))


def test_prompts_that_do_not_fit_are_refused():
    projected, cache, tables = Case(64, 60).make()
    with (
        execution.interpreted(plgpu.InterpretGPUParams()),
        pytest.raises(ValueError, match="capacity=60 positions cannot hold prompts padded to 64 tokens"),
    ):
        attention.enter_prompts(projected, cache, jnp.int32(LAYER), tables)
    with pytest.raises(ValueError, match="do not fit a cache of shape"):
        prompt_heads((jnp.zeros((1, 8, 3, 16)),) * 3, cache.keys, cache.values, jnp.int32(0))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(8, 8, head_dim=272), "at most 256 numbers, not 272"),
        (Case(8, 8, head_dim=4, dtype=jnp.bfloat16), "a multiple of 16 bytes"),
        (Case(8, 8, head_dim=24), "head_dim must be a multiple of 16"),
    ],
)
def test_what_it_does_not_serve(case, reason):
    projected, cache, tables = case.make()
    with pytest.raises(NotImplementedError, match=reason):
        prompt_heads(projected, cache.keys, cache.values, jnp.int32(0), tables=tables)
    with pytest.raises(NotImplementedError, match="the cache has int8"):
        prompt_heads(projected, *(x.astype(jnp.int8) for x in (cache.keys, cache.values)), jnp.int32(0))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_model_reads_prompts_as_with_xla(monkeypatch, positions):
    config = TransformerConfig(
        vocab_size=37,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=20,
        context_length=64,
        positions=positions,
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    ids, lengths = jnp.arange(12).reshape(2, 6), jnp.array([6, 3])
    prefill = jax.jit(lambda model, *args: model.prefill(*args, 64))
    expected, written = prefill(model, ids, lengths)
    monkeypatch.setattr(attention, "rotated_heads", None)
    with execution.interpreted(plgpu.InterpretGPUParams()):
        found, cache = jax.jit(lambda model, *args: model.prefill(*args, 64))(model, ids, lengths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for a, b in zip(*map(jax.tree.leaves, (cache, written)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# Compiled for the H200.

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        Case(2048, 2112, 1, 32, 32, 128, jnp.bfloat16),  # Llama-2-7B
        Case(1000, 1024, 4, 32, 8, 128, jnp.bfloat16),  # Llama-3-8B
        Case(512, 576, 1, 9, 3, 64, jnp.bfloat16, joined=False),  # SmolLM2-135M
        Case(2048, 2112, 1, 32, 32, 128, jnp.float16, rope=False),  # OPT-6.7B, BLOOM-7B1
        Case(512, 576, 1, 32, 32, 96, jnp.bfloat16),  # Phi-3-mini
        Case(512, 576, 1, 8, 4, 256, jnp.float32),  # Gemma-2-2B
    ],
    ids=str,
)
def test_kernels_compile_without_spills(monkeypatch, case):
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    projected, cache, tables = jax.eval_shape(case.make)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    _, report = sm90_compile.compile_for_h200(attention._enter_on_sm90, projected, cache, layer, tables)
    assert report.registers
    assert report.spill_bytes == 0

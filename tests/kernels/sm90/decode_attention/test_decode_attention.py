"""Attention of one token on Hopper: against XLA's and a loop in numpy, with no races, compiled without spills."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.decode_attention.config import plan_attention
from bipolar_jax.kernels.sm90.decode_attention.launch import decode_attention
from bipolar_jax.models.blocks import attention
from bipolar_jax.models.blocks.scoring import PLAIN
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.models.transformer import Transformer
from tests.support import sm90_compile
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("clean_interpreter")]

LAYERS, LAYER = 2, 1
BITS = [None, 8, 4]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: what attention is given, but for the numbers."""

    lengths: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    capacity: int = 64
    bits: int | None = None
    dtype: type = jnp.float32
    rope: bool = True
    alibi: bool = False
    sequences: int = 1  # that a block takes in turn
    warpgroups: int = 1  # of a block

    def make(self):
        """q, k, v, cache and the tables."""
        return self._made_of(np.random.default_rng(0).standard_normal)

    def shapes(self):
        """Of what `make` gives; nothing is drawn."""
        return jax.eval_shape(lambda: self._made_of(jnp.zeros))

    def _made_of(self, draw):
        batch = len(self.lengths)

        def normal(*shape, dtype=self.dtype):
            return jnp.asarray(draw(shape), dtype)

        q, k, v = (normal(batch, 1, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads))
        kept = [normal(LAYERS, batch, self.kv_heads, self.capacity, self.head_dim) for _ in range(2)]
        if self.bits is not None:
            kept = [jax.jit(QuantizedHeads.quantize, static_argnums=1)(heads, self.bits) for heads in kept]
        angles = normal(batch, 1, self.head_dim // 2, dtype=jnp.float32)
        tables = (jnp.cos(angles), jnp.sin(angles)) if self.rope else None
        return q, k, v, KVCache(*kept, jnp.asarray(self.lengths, jnp.int32)), tables


def interpreted(monkeypatch, case: Case, operands, splits: int | None = None, joined: bool = False):
    """Through the dispatch of the models, with the race detector on."""
    if splits is not None:
        chosen = plan_attention
        monkeypatch.setattr(
            "bipolar_jax.kernels.sm90.decode_attention.launch.plan_attention",
            lambda *args: chosen(*args[:-3], splits, case.sequences, case.warpgroups),
        )
    with execution.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        q, k, v, cache, tables = operands
        projected = (jnp.concatenate([q, k, v], axis=2),) if joined else (q, k, v)
        result = attention.attend_in_one_kernel(projected, cache, jnp.int32(LAYER), tables, case.alibi)
    assert not races_found()
    return result


def in_float64(case: Case, q, cache: KVCache) -> np.ndarray:
    """A loop over heads; the cache holds the new token."""
    q = np.asarray(q, np.float64)
    keys, values = (
        np.asarray((kept.dequantize() if case.bits else kept)[LAYER], np.float64) for kept in (cache.keys, cache.values)
    )
    slopes = attention.alibi_slopes(case.heads) if case.alibi else np.zeros(case.heads)
    out = np.empty(q.shape)
    for row, head in np.ndindex(len(case.lengths), case.heads):
        seen, shared = min(case.lengths[row] + 1, case.capacity), head * case.kv_heads // case.heads
        scores = keys[row, shared, :seen] @ q[row, 0, head] / np.sqrt(case.head_dim) + slopes[head] * np.arange(seen)
        weights = np.exp(scores - scores.max())
        out[row, 0, head] = weights @ values[row, shared, :seen] / weights.sum()
    return out


CASES = {
    "tiles, alibi, full": (
        Case(
            (90, 128),
            heads=2,
            kv_heads=2,
            head_dim=64,
            capacity=128,
            dtype=jnp.bfloat16,
            rope=False,
            alibi=True,
            warpgroups=2,
        ),
        2,
    ),
    "one query a key": (Case((0, 63), heads=2, kv_heads=2), 1),
    "ragged": (Case((0, 1, 63, 64, 130, 191), heads=1, capacity=192, head_dim=64), 2),
    "full": (Case((128, 127), capacity=128), 2),
    "four queries": (Case((100,), heads=8, kv_heads=2, capacity=128, head_dim=128, dtype=jnp.bfloat16), 2),
    "queries of two members": (Case((70,), heads=7, capacity=128, head_dim=128, dtype=jnp.bfloat16, warpgroups=2), 2),
    "eight queries": (Case((64,), heads=8, capacity=128, head_dim=128, dtype=jnp.float16, warpgroups=2), 1),
    "rings go round": (Case((640,), heads=1, capacity=640, head_dim=128), 1),
    "most splits": (Case((575,), heads=1, capacity=576, head_dim=16, dtype=jnp.bfloat16), 8),
    "alibi": (Case((90, 20), heads=4, kv_heads=4, capacity=128, rope=False, alibi=True), 2),
    "odd sizes": (Case((50,), head_dim=80, dtype=jnp.bfloat16), 1),
    "wide": (Case((50,), head_dim=256, heads=1), 2),
    "8 bits": (Case((0, 200), heads=4, kv_heads=1, capacity=256, bits=8), 2),
    "4 bits": (Case((255, 1), heads=1, capacity=256, bits=4, dtype=jnp.bfloat16), 2),
    "8 bits, alibi, wide": (Case((100,), capacity=128, head_dim=128, bits=8, rope=False, alibi=True), 1),
    "4 bits, odd sizes": (Case((50,), head_dim=96, bits=4, dtype=jnp.bfloat16), 1),
    "4 bits, full": (Case((64, 40), heads=3, kv_heads=3, head_dim=64, bits=4), 1),
}


# Texts of no tile, of part of one, of whole ones, and of more than a ring holds.
IN_TURN = {
    "tiles": Case(
        (70, 0, 300, 320), kv_heads=1, head_dim=64, capacity=320, dtype=jnp.bfloat16, sequences=2, warpgroups=2
    ),
    "rows, 8 bits": Case((0, 191, 128, 100), heads=1, capacity=192, bits=8, sequences=4),
}


@pytest.mark.parametrize("case", IN_TURN.values(), ids=IN_TURN)
def test_a_block_takes_sequences_in_turn(monkeypatch, case):
    test_a_token_attends_and_enters_the_cache(monkeypatch, case, 1)


@pytest.mark.parametrize(("case", "splits"), CASES.values(), ids=CASES)
@pytest.mark.sample(2)
def test_a_token_attends_and_enters_the_cache(monkeypatch, case, splits):
    operands = q, _, _, before, tables = case.make()
    context, after = interpreted(monkeypatch, case, operands, splits)
    on_xla = functools.partial(attention._attend_on_xla, scoring=PLAIN)
    expected, written = jax.jit(on_xla, static_argnums=4)(operands[:3], before, LAYER, tables, case.alibi)
    assert (context.shape, context.dtype) == (q.shape, q.dtype)
    precision = float(jnp.finfo(case.dtype).eps)
    np.testing.assert_allclose(
        context.astype(jnp.float32), expected.astype(jnp.float32), rtol=2 * precision, atol=max(precision, 5e-6)
    )
    assert jax.tree.structure(after) == jax.tree.structure(written)
    for found, wanted, old in zip(*(map(jax.tree.leaves, (after, written, before))), strict=True):
        # Rotated and quantized by other instructions: the last bit, and now and then a code, may differ.
        exact = found.dtype in (jnp.int32, jnp.uint8)
        difference = np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64))
        assert difference.max() <= (1 if exact else 4 * precision * np.abs(np.asarray(wanted, np.float64)).max())
        assert np.mean(difference > 0) < 0.01 or not exact
        assert np.count_nonzero(np.asarray(found != old)) <= np.count_nonzero(np.asarray(wanted != old)) * 1.2
    if tables is not None:
        q = attention.rotate(q, tables)
    np.testing.assert_allclose(
        np.asarray(context, np.float64), in_float64(case, q, after), rtol=2 * precision, atol=max(precision, 5e-6)
    )


def test_numbers_beyond_a_sequence_are_not_seen(monkeypatch):
    """What an earlier text left in the cache, however large."""
    case = Case((37,), capacity=128)
    q, k, v, cache, tables = case.make()
    spoiled = dataclasses.replace(cache, keys=cache.keys.at[..., 38:, :].set(1e30), values=1e30 + 0 * cache.values)
    spoiled = dataclasses.replace(spoiled, values=spoiled.values.at[..., :38, :].set(cache.values[..., :38, :]))
    expected, _ = interpreted(monkeypatch, case, (q, k, v, cache, tables))
    found, _ = interpreted(monkeypatch, case, (q, k, v, spoiled, tables))
    np.testing.assert_array_equal(found, expected)


def test_heads_may_lie_in_one_array(monkeypatch):
    case = Case((40,), heads=4, kv_heads=2)
    operands = case.make()
    expected, found = (interpreted(monkeypatch, case, operands, joined=joined) for joined in (False, True))
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_scores_do_not_overflow(monkeypatch):
    case = Case((40,), heads=1, rope=False)
    q, k, v, cache, tables = case.make()
    context, after = interpreted(monkeypatch, case, (1000 * q, k, v, cache, tables))
    np.testing.assert_allclose(context, in_float64(case, 1000 * q, after), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("positions", "bits"), [("rope", None), ("rope", 4), ("alibi", 8)])
@pytest.mark.sample(1)
@pytest.mark.covered("the kernel, by the tests above; the model, by `make gpu-test`")
def test_a_model_decodes_as_with_xla(monkeypatch, positions, bits):
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
    _, cache = model.prefill(jnp.arange(12).reshape(2, 6), jnp.array([6, 3]), 64, bits)
    token = jnp.array([7, 8])
    expected, written = jax.jit(lambda model, *args: model.decode(*args))(model, token, cache)
    monkeypatch.setattr(attention, "_attend_on_xla", None)
    with execution.interpreted(plgpu.InterpretGPUParams()):
        found, grown = jax.jit(lambda model, *args: model.decode(*args))(model, token, cache)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert jax.tree.structure(grown) == jax.tree.structure(written)
    np.testing.assert_array_equal(grown.lengths, [7, 4])


@pytest.mark.parametrize(
    ("sizes", "bits", "splits", "members", "warpgroups"),
    [
        ((1, 32, 32, 1024, 128), None, 4, 1, 1),
        ((1, 24, 24, 1024, 128), 8, 8, 1, 1),
        ((1, 32, 8, 1024, 128), None, 8, 1, 1),
        ((1, 64, 8, 1024, 128), None, 4, 2, 1),
        ((64, 32, 32, 1024, 128), None, 1, 1, 1),
        ((1, 9, 3, 64, 64), None, 1, 1, 1),
        ((4, 32, 8, 4096, 128), None, 4, 1, 1),
        ((8, 32, 8, 4096, 128), None, 2, 1, 2),
        ((16, 32, 8, 4096, 128), None, 1, 1, 2),
        ((16, 32, 8, 4096, 128), 4, 2, 1, 1),
    ],
    ids=str,
)
def test_sequences_are_split_as_long_as_clusters_run_at_once(sizes, bits, splits, members, warpgroups):
    plan = plan_attention(*sizes, jnp.uint8 if bits else jnp.bfloat16, bits)
    assert (plan.splits, plan.members, plan.warpgroups) == (splits, members, warpgroups)
    assert plan.slots >= 2
    assert plan.capacity % plan.positions == 0


def test_blocks_take_sequences_in_turn_where_they_would_run_in_turn():
    def chosen(batch, heads=32, kv_heads=8, bits=None):
        dtype = jnp.uint8 if bits else jnp.bfloat16
        plan = plan_attention(batch, heads, kv_heads, 320, 128, dtype, bits)
        return plan.sequences, plan.warpgroups

    expected = {
        1: (1, 1),
        8: (1, 2),
        16: (1, 2),
        17: (1, 1),
        18: (1, 1),
        32: (2, 2),
        33: (1, 1),
        34: (2, 1),
        64: (4, 2),
    }
    expected |= {128: (8, 2), 65: (1, 1), 1024: (1, 1)}
    assert {batch: chosen(batch) for batch in expected} == expected
    assert [chosen(batch, bits=8) for batch in (32, 64, 128)] == [(1, 1), (2, 1), (4, 1)]
    assert chosen(64, 64) == (1, 1)  # two blocks share a key head
    for batch, splits, number in ((5, 1, 2), (4, 2, 2)):
        with pytest.raises(ValueError, match=f"a block takes 2 sequences of {batch} in turn"):
            plan_attention(batch, 8, 8, 320, 128, jnp.bfloat16, None, splits, number)
    with pytest.raises(ValueError, match="2 warpgroups share a block on tensor cores only"):
        plan_attention(1, 8, 8, 320, 128, jnp.uint8, 8, warpgroups=2)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((1, 4, 4, 64, 24), "head_dim must be a multiple of 16 up to 256, not 24"),
        ((1, 4, 4, 64, 272), "head_dim must be a multiple of 16 up to 256, not 272"),
        ((1, 4, 4, 100, 64), "capacity must be a multiple of 64, not 100"),
        ((1, 4, 4, 64, 80), "multiple of 16 bytes, not 40"),
        ((1, 71, 1, 64, 64), "71 queries of head_dim=64 that share a key head"),
    ],
)
def test_what_it_does_not_serve(sizes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        plan_attention(*sizes, jnp.uint8, 4)


def test_shapes_that_do_not_fit_are_refused():
    cache = (jnp.zeros((2, 1, 2, 64, 32)),)
    with pytest.raises(ValueError, match="do not fit a cache of shape"):
        decode_attention((jnp.zeros((1, 3, 32)),) * 3, cache, cache, jnp.int32(0), jnp.zeros(1, jnp.int32))


def test_a_cache_of_another_dtype_is_left_to_xla():
    cache = (jnp.zeros((2, 1, 2, 64, 32)),)
    with pytest.raises(NotImplementedError, match="heads are bfloat16, the cache has float32"):
        decode_attention((jnp.zeros((1, 6, 32), jnp.bfloat16),), cache, cache, jnp.int32(0), jnp.zeros(1, jnp.int32))


# Compiled for the H200.

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "head_dim", "alibi"),
    [
        (1, 32, 32, 128, False),  # Llama-2-7B
        (64, 32, 32, 128, False),
        (1, 32, 8, 128, False),  # Llama-3-8B
        (16, 32, 8, 128, False),
        (64, 32, 8, 128, False),
        (64, 64, 8, 128, False),  # Llama-3-70B
        (1, 9, 3, 64, False),  # SmolLM2-135M
        (1, 32, 32, 128, True),  # BLOOM-7B1
        (1, 32, 32, 96, False),  # Phi-3-mini
        (1, 8, 4, 256, False),  # Gemma-2-2B
    ],
    ids=str,
)
@pytest.mark.sample(2)
def test_kernels_compile_without_spills(batch, heads, kv_heads, head_dim, alibi, bits):
    case = Case((1,) * batch, heads, kv_heads, head_dim, 256, bits, jnp.bfloat16, rope=not alibi, alibi=alibi)

    def attend(projected, cache, layer, tables):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(execution, "is_hopper", lambda device: True)
            return attention.attend_in_one_kernel(projected, cache, layer, tables, alibi)

    *projected, cache, tables = case.shapes()
    _, report = sm90_compile.compile_for_h200(
        attend, tuple(projected), cache, jax.ShapeDtypeStruct((), jnp.int32), tables
    )
    assert report.registers
    assert report.spill_bytes == 0


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.sample(1)
def test_a_model_writes_and_reads_its_cache_in_place(monkeypatch, bits):
    """A step of the loop that generates: the kernel's own temporaries and not a byte of the cache."""
    config = TransformerConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        ffn_size=128,
        context_length=8192,
    )

    def make():
        return Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    ids = jnp.zeros((2, 64), jnp.int32)
    _, cache = nnx.eval_shape(lambda: make().prefill(ids, jnp.full(2, 64), 8192, bits))
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)

    def generate(model, ids, cache):
        def step(carry, _):
            logits, cache = model.decode(*carry)
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (ids, cache), length=3)[0]

    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled, _ = sm90_compile.compile_for_h200(generate, nnx.eval_shape(make), token, cache)
    assert "scatter" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes / (4 * config.num_layers)

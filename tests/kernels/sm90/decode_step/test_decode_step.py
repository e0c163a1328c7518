"""All layers of a decode step in one kernel: interpreted against a twin written from the definitions, and compiled."""

from __future__ import annotations

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat, Precision
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.decode_step import api
from bipolar_jax.kernels.sm90.decode_step.api import decode_layers
from bipolar_jax.kernels.sm90.decode_step.bit_planes import transpose_bits
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import ordered_bits
from bipolar_jax.models.blocks import fused_decode
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.kv_cache.cache import keep
from bipolar_jax.models.random_weights import random_float, random_packed
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import Rotation
from tests.kernels.sm90.decode_step.layers_twin import EPS, SWIGLU, Case, check_layers, compiled, preset_case
from tests.support import sm90_compile, warpgroup_simulator

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (Case(1, 256, 384, 2, 1, 2, 2, 192, 100, calibration="minmax"), 5),
        (Case(1, 128, 1152, 1, 1, 3, 8, 320, 300, bias=True, cache_dtype=jnp.float16), 3),
        (Case(1, 128, 128, 1, 1, 8, 8, 128, 0, "mse", True, 1.0, LayerNorm, Activation("relu"), "learned"), 1),
        (Case(1, 384, 128, 3, 3, 4, 4, 128, 64, "mse", True, 1.0, LayerNorm, Activation("gelu"), "alibi"), 3),
        (Case(1, 256, 128, 2, 1, 2, 8, 192, 150, cache_bits=8), 5),
        (
            Case(
                1,
                128,
                128,
                1,
                1,
                4,
                8,
                320,
                300,
                "mse",
                True,
                1.0,
                LayerNorm,
                Activation("gelu"),
                "alibi",
                cache_bits=4,
                rotates_keys=True,
            ),
            3,
        ),
        # A full cache. Small gains: SwiGLU's underflow far below zero, here and there another, would decide signs.
        (Case(1, 128, 256, 1, 1, 1, 1, 64, 64, gain=0.05), 2),
    ],
    ids=lambda value: (
        f"W{value.w_bits}A{value.a_bits}, cache {value.cache_bits}" if isinstance(value, Case) else f"{value} blocks"
    ),
)
@pytest.mark.covered("the kernel, by `make gpu-test`; the phases, by test_heads_of_64.py")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


def small_model(precision: str = "W2A8", **changes) -> Transformer:
    config = dataclasses.replace(
        TransformerConfig(
            vocab_size=64,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=128,
            ffn_size=256,
            context_length=128,
            qkv_bias=True,
        ),
        **changes,
    )
    return random_packed(config, Precision.parse(precision), dtype=jnp.bfloat16, key=jax.random.key(0), embed_bits=None)


SMALL_HEADS = {"hidden_size": 192, "num_heads": 3, "head_dim": 64, "ffn_size": 320}
ROTATED = Rotation(ffn=hadamard(320, block=64), keys=hadamard(64))


@pytest.mark.parametrize(
    ("precision", "cache_bits", "sizes", "runs", "texts"),
    [
        ("W2A8", None, {}, 2, 1),
        ("W4A8g128i", None, SMALL_HEADS, 1, 1),
        ("W4A8g128i", None, SMALL_HEADS, 2, 2),
        ("W2A8", 8, {}, 2, 1),
        ("W4A8g64i", 4, SMALL_HEADS | {"rotation": ROTATED}, 2, 1),
        ("W4A16g64i", None, SMALL_HEADS, 1, 1),
        ("W4A8g64i", None, SMALL_HEADS | {"qk_norm": True}, 1, 1),
    ],
)
@pytest.mark.covered("the model, by `make gpu-test`; a kernel of all phases, by test_heads_of_64.py")
def test_a_model_decodes_the_same(precision, cache_bits, sizes, runs, texts, monkeypatch):
    """Every run of layers is a kernel, which finds its layers in the cache of all."""
    layout = "tensor_cores" if precision.endswith("i") else "planes"
    model = prepare_for_inference(small_model(precision, **sizes), layout=layout, fused_sequences=texts)
    model = model.with_runs([range(2)] if runs == 1 else [range(1), range(1, 2)])
    ids, tokens = jnp.arange(1, 11 * texts + 1).reshape(texts, 11), jnp.arange(5, 5 + texts)
    _, cache = model.prefill(ids, jnp.full(texts, 11), 64, cache_bits)
    layered, layered_cache = model.decode(tokens, cache)
    monkeypatch.setattr(api, "default_device", lambda: None)
    monkeypatch.setattr(api, "MULTIPROCESSORS", 3 * texts)  # a head a block, at most
    reached = []
    monkeypatch.setattr(sm90, "decode_layers", recording(sm90.decode_layers, reached))
    with interpreted(plgpu.InterpretGPUParams()):
        fused, fused_cache = model.decode(tokens, cache)
    assert reached == ["done"] * runs
    np.testing.assert_array_equal(fused_cache.lengths, layered_cache.lengths)
    np.testing.assert_allclose(fused, layered, atol=0.03 * float(jnp.max(jnp.abs(layered))))
    for got, expected in ((fused_cache.keys, layered_cache.keys), (fused_cache.values, layered_cache.values)):
        if cache_bits is not None:
            got, expected = got.dequantize(), expected.dequantize()
        got, expected = (np.asarray(array, np.float32) for array in (got, expected))
        np.testing.assert_array_equal(got[:, :, :, :11], expected[:, :, :, :11])
        # What is a rounding apart may be quantized a step apart.
        atol = (0.03 if cache_bits != 4 else 0.1) * np.abs(expected).max()
        np.testing.assert_allclose(got[:, :, :, 11], expected[:, :, :, 11], atol=atol)
        np.testing.assert_array_equal(got[:, :, :, 12:], expected[:, :, :, 12:])


def recording(function, reached: list[str]):
    """The function, which leaves a word when it has returned."""

    def call(*args, **options):
        outcome = function(*args, **options)
        reached.append("done")
        return outcome

    return call


@pytest.mark.parametrize(
    ("model", "batch", "cache_bits", "message"),
    [
        (lambda: join_projections(small_model()), 2, None, "one sequence, not for 2"),
        (lambda: join_projections(small_model()), 1, 8, "zeros of 40 positions are no multiple of 16 bytes"),
        (lambda: join_projections(small_model("W4A8g64f")), 1, None, "one scale a column"),
        (lambda: join_projections(small_model("W2A16")), 1, None, "prepared weights that have groups, or no offsets"),
        (small_model, 1, None, "qkv projections must be one packed layer"),
        (lambda: join_projections(small_model(head_dim=32)), 1, None, "64 or 128 numbers, not 32"),
        (lambda: random_float(small_model().config, jnp.bfloat16, jax.random.key(0)), 1, None, "one packed layer"),
    ],
)
def test_what_the_kernel_does_not_serve(model, batch, cache_bits, message):
    @nnx.eval_shape  # nothing is computed before it is refused
    def refused():
        there, ids = model(), jnp.ones((batch, 8), jnp.int32)
        _, cache = there.prefill(ids, jnp.full(batch, 8), 64 if cache_bits is None else 40, cache_bits)
        hidden, tables = there.enter_tokens(ids[:, 0], cache)
        with interpreted(plgpu.InterpretGPUParams()), pytest.raises(NotImplementedError, match=message):
            fused_decode.fused_layers(there.layers, there.config, hidden, tables, cache, most_sequences=1)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("length", [3, 64])
@pytest.mark.sample(2)
@pytest.mark.covered("the phases, by threads; the model, by `make gpu-test`")
def test_all_layers_are_written_as_one_by_one(bits, length):
    """Where there is room: a full cache keeps what it has."""
    heads = jax.random.normal(jax.random.key(0), (2, 2, 64, 3, 8), jnp.bfloat16)  # tokens before heads
    kept = keep(heads, bits)
    cache = fused_decode.KVCache(kept, jax.tree.map(jnp.flip, kept), jnp.array([length, 5]))
    keys, values = jax.random.normal(jax.random.key(1), (2, 2, 2, 1, 3, 8), jnp.bfloat16)
    expected = cache
    for layer in range(2):
        expected = expected.write(layer, keys[layer], values[layer])
    jax.tree.map(np.testing.assert_array_equal, cache.write_all(keys, values), expected)


@pytest.mark.parametrize(
    ("name", "precision", "cache_bits"),
    [
        ("llama-2-7b", (1, 1), None),
        ("llama-2-7b", (2, 8), None),
        ("llama-3-8b", (8, 8), None),
        ("qwen2.5-7b", (3, 2), None),  # with a cache of float16
        ("opt-6.7b", (2, 2), None),
        ("bloom-7b1", (4, 8), None),
        ("llama-2-7b", (1, 1), 4),
        ("llama-2-7b", (4, 8), 8),
        ("llama-3-8b", (8, 8), 4),
        ("opt-6.7b", (2, 2), 8),
        ("bloom-7b1", (4, 8), 4),
        ("qwen3-8b", (2, 8), None),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.sample(1)
def test_compiles_without_spills(name, precision, cache_bits):
    cache_dtype = jnp.float16 if name.startswith("qwen") else jnp.bfloat16
    case = preset_case(name, *precision, cache_dtype=cache_dtype, cache_bits=cache_bits)
    assert not compiled(case).serialized_wgmma


SMALL = Case(1, 128, 128, 1, 1, 2, 8, 64, 32)


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
def test_a_kernel_without_progress_traps():
    """The producer's waits for the consumers are bounded; these wait for other blocks, and then for the producer."""
    operands = SMALL.operands()
    static = {n: operands.pop(n) for n in ("a_format", "activation", "cache_bits", "spans", "key_rotation")}
    avals = jax.eval_shape(lambda: operands)
    _, report = sm90_compile.compile_for_h200(
        lambda operands: decode_layers(**operands, **static, blocks=4, wait_limit_ms=10**6), avals, ptx=True
    )
    limits = re.findall(r"setp.lt.u64 p, now, (\d+);\s*@p bra AGAIN;\s*trap;", report.text)  # in ns
    assert len(limits) >= 4, "for the weights of each product"
    assert set(limits) == {str(10**12)}
    assert re.search(r"%nsmid;\s*setp.lt.u32 fewer, multiprocessors, 4;\s*@fewer trap;", report.text)


def test_blocks_are_as_many_as_multiprocessors(monkeypatch):
    operands = SMALL.operands()
    monkeypatch.setattr(api, "default_device", lambda: types.SimpleNamespace(core_count=7))
    traced = jax.eval_shape(lambda: {name: operands[name] for name in ("keys", "values")})
    assert api.plan_decode_layers(**operands | traced).tiling.blocks == 7
    with pytest.raises(NotImplementedError, match="8 blocks wait for each other, more than the device's 7"):
        jax.eval_shape(lambda kept: decode_layers(**operands | kept, blocks=8), traced)


@pytest.mark.parametrize(
    ("name", "changed"),
    [("up", {"eps": 2 * EPS}), ("qkv", {"eps": 2 * EPS}), ("up", None)],
    ids=["epsilon of up", "epsilon of qkv", "kind"],
)
def test_norms_of_a_layer_that_differ_are_refused(name, changed):
    operands = SMALL.operands()
    norm = operands["norms"][name]
    other = LayerNorm(norm.gain, norm.gain, EPS) if changed is None else dataclasses.replace(norm, **changed)
    operands["norms"] = operands["norms"] | {name: other}
    with pytest.raises(NotImplementedError, match="both norms of a layer must be of one kind and epsilon"):
        decode_layers(**operands, blocks=1, interpret=plgpu.InterpretGPUParams())


def test_sizes_that_do_not_fit():
    def shape(**changes):
        fields = dict(
            num_layers=1, hidden=256, ffn=256, heads=2, kv_heads=1, head_dim=128, a_format=BipolarFormat(8),
            w_format=BipolarFormat(2), norm="rms", norm_eps=EPS, activation=SWIGLU, blocks=4,
        )  # fmt: skip
        return LayersShape(**(fields | changes))

    assert shape().splits == 2
    for changes, message in (
        ({"hidden": 224}, "multiples of 64, not 224"),
        ({"heads": 8}, "8 heads are more than the 4 blocks"),
        ({"ffn": 1 << 17}, "leave no shared memory"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            shape(**changes)


def test_bits_of_eight_bytes_are_transposed(monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    rows = np.random.default_rng(0).integers(0, 256, (128, 8), np.uint8)
    words = [np.ascontiguousarray(rows[:, i : i + 4]).view(np.int32)[:, 0] for i in (0, 4)]
    low, high = transpose_bits(*words)
    planes = np.stack([low, high], axis=1).view(np.uint8)
    bits = np.unpackbits(rows[..., None], axis=2, bitorder="little")  # [thread, byte, bit]
    np.testing.assert_array_equal(planes, np.packbits(bits, axis=1, bitorder="little")[:, 0])


def test_floats_in_order_as_integers(monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    numbers = np.sort(np.random.default_rng(0).standard_normal(128)).astype(np.float32)
    numbers[[0, -2, -1]] = -np.inf, np.inf, np.nan
    words = ordered_bits(numbers.view(np.int32))
    assert (np.diff(words.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(ordered_bits(words), numbers.view(np.int32))

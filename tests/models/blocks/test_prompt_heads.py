"""Prompts' heads in models: Hopper's kernel gives the cache and logits of XLA, which gets what that does not serve."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.projections import prompt_projection
from bipolar_jax.models import compressible_blocks
from bipolar_jax.models.blocks import prompt_heads
from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.packing import PreparedArray
from tests.support import sm90_compile
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("clean_interpreter")]

BATCH, LENGTH, CAPACITY = 2, 70, 130


def make(precision: str, *, hidden: int = 64, dtype=jnp.bfloat16, **fields) -> Transformer:
    """Only the joined projection may use Hopper's kernels: the others take their time in interpret mode."""
    config = TransformerConfig(
        **{"vocab_size": 50, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64} | fields,
        hidden_size=hidden,
        ffn_size=96,
        context_length=256,
    )
    model = Transformer(config, param_dtype=dtype, rngs=nnx.Rngs(0))
    if config.qkv_bias:
        for layer in (model.layers.attention.q_proj, model.layers.attention.k_proj, model.layers.attention.v_proj):
            layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape).astype(dtype)
    rules = [(".*_proj", bj.Precision.parse(precision))]
    model = join_projections(bj.quantize_model(model, rules, implementation="xla"))
    model.layers.attention.qkv_proj.implementation = "auto"
    return model


def prompts(batch: int = BATCH, length: int = LENGTH):
    ids = np.random.default_rng(0).integers(0, 50, (batch, length)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray([length, length - 31, length - 3][:batch], jnp.int32)


def prefill(model: Transformer, ids, lengths):
    return jax.jit(lambda model: model.prefill(ids, lengths, CAPACITY))(model)


@pytest.mark.parametrize(
    ("precision", "fields", "batch"),
    [
        ("W4A8", {"qkv_bias": True}, 2),
        ("W2A2", {"positions": "alibi", "norm": "layer", "head_dim": 128}, 1),
        ("W4A8g32i", {"head_dim": 128}, 2),
    ],
)
@pytest.mark.covered(
    "the projection, by the tests above and in kernels/sm90/projections; the model, by `make gpu-test`"
)
def test_a_model_reads_prompts_as_with_xla(monkeypatch, precision, fields, batch):
    model, (ids, lengths) = make(precision, **fields), prompts(batch)
    expected, written = prefill(model, ids, lengths)
    if precision.endswith("i"):  # what only Hopper's kernels may use; the other projections keep their planes
        model = prepare_for_inference(model, layout="tensor_cores")
        assert isinstance(model.layers.attention.qkv_proj.kernel.get_value(), PreparedArray)
    monkeypatch.setattr(prompt_heads, "rotated_heads", None)
    with execution.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found, cache = prefill(model, ids, lengths)
    assert not races_found()
    np.testing.assert_array_equal(cache.lengths, written.lengths)
    for some, others in ((cache.keys, written.keys), (cache.values, written.values)):
        some, others = (np.asarray(array, np.float32) for array in (some, others))
        # The first layer's inputs are the same but for what lies between two codes; rounded twice or once.
        difference = np.abs(some[0] - others[0])
        assert np.quantile(difference, 0.99) <= 2**-7 * np.abs(others[0]).max()
        assert np.linalg.norm(some - others) < 0.05 * np.linalg.norm(others)
        np.testing.assert_array_equal(some[..., LENGTH:, :], 0)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("precision", "fields", "cache_bits"),
    [
        ("W4A8", {}, 8),
        ("W4A16", {}, None),
        ("W4A8g32f", {}, None),
        ("W4A8", {"head_dim": 32}, None),
        ("W4A8", {"rope_scaling": RopeScaling("yarn", 4.0, original_context_length=64, attention_factor=2.5)}, None),
    ],
)
@pytest.mark.sample(1)
def test_xla_serves_the_rest(monkeypatch, precision, fields, cache_bits):
    """Refused before anything is interpreted, which the product itself would be."""
    model, (ids, lengths) = make(precision, **fields), prompts()
    expected = jax.eval_shape(lambda: model.prefill(ids, lengths, CAPACITY, cache_bits))
    launched = []
    monkeypatch.setattr(prompt_projection, "_project", lambda *args: launched.append(args))
    with execution.interpreted(plgpu.InterpretGPUParams()):
        found = jax.eval_shape(lambda: model.prefill(ids, lengths, CAPACITY, cache_bits))
    assert found == expected
    assert not launched


def operands(
    *, batch=2, length=70, heads=4, head_dim=64, capacity=128, dtype=jnp.bfloat16, cache_dtype=None, **options
):
    w = bj.quantize(jnp.ones((64, heads * head_dim)), 4, 0, **options)
    cache = jnp.zeros((2, batch, 1, capacity, head_dim), cache_dtype or dtype)
    x = jnp.zeros((batch, length, 64), dtype)
    return x, w, bj.BipolarFormat(8), None, None, cache, cache, jnp.int32(0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float32}, "to a cache of the same, not float32"),
        ({"cache_dtype": jnp.float16}, "to a cache of the same, not bfloat16"),
        ({"head_dim": 96}, "heads must have 64 or 128 numbers, not 96"),
        ({"length": 63}, "prompts of 63 tokens do not fill tiles of 64"),
        ({"group_size": 32, "scales": "float"}, "float scales of groups"),
    ],
)
def test_what_it_does_not_serve(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        prompt_projection.prompt_heads(*operands(**options))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a cache of capacity=64 positions cannot hold prompts padded to 70 tokens"):
        prompt_projection.prompt_heads(*operands(capacity=64))
    with pytest.raises(ValueError, match="2 prompts and 128 columns do not fit caches of shapes"):
        prompt_projection.prompt_heads(*operands(heads=2))
    with pytest.raises(NotImplementedError, match="compute capability"):
        sm90.prompt_heads(*operands())


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.covered("programs for the H200, by test_attention.py")
def test_on_the_h200_no_kernel_of_xla_touches_heads(monkeypatch):
    """Between the product and attention there is nothing, and the cache is written in place."""
    model = nnx.eval_shape(lambda: make("W1A1", num_layers=16, num_heads=4, num_kv_heads=2, head_dim=128))
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    monkeypatch.setattr(compressible_blocks, "causal_attention", lambda q, k, v, **_: q + jnp.repeat(k + v, 2, axis=2))
    compiled, report = sm90_compile.compile_for_h200(
        lambda model, ids, lengths: model.prefill(ids, lengths, 1024),
        model,
        jax.ShapeDtypeStruct((8, 970), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    assert report.spill_bytes == 0
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert not [word for word in ("dynamic-update-slice", "transpose(") if word in text]
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 2

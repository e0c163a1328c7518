"""Models prepared for inference: joined, in the dtype asked for, and what is refused is said."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference import xla_flags
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.prepare import belongs_on_tensor_cores, prepare_for_inference
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.packing import PreparedArray, UnpackedArray
from tests.support import sm90_compile

CONFIG = TransformerConfig(
    vocab_size=50,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_size=72,
    context_length=64,
)
RULES = [("^layers/", bj.Precision.parse("W4A8")), ("embed", bj.Precision(8))]


def quantized(rules=RULES, **fields) -> Transformer:
    config = TransformerConfig(**{**CONFIG.to_dict(), **fields})
    return bj.quantize_model(Transformer(config, rngs=nnx.Rngs(0)), rules)


def float_dtypes(model: Transformer) -> set[str]:
    """dtypes of the variables that are float arrays, not packed ones."""
    values = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(model))]
    return {value.dtype.name for value in values if isinstance(value, jax.Array) and value.dtype.kind in "fV"}


@pytest.mark.covered("joining, by test_join_projections.py; what is prepared, by the tests below")
def test_packed_layers_are_joined_and_the_numbers_stay():
    model = quantized()
    prepared = prepare_for_inference(model)
    assert hasattr(prepared.layers.attention, "qkv_proj")
    assert hasattr(prepared.layers.ffn, "gate_up_proj")
    assert hasattr(model.layers.attention, "q_proj")
    prompts = [[1, 2, 3], [7]]
    assert generate(prepared, prompts, 6) == generate(model, prompts, 6)
    assert float_dtypes(prepared) == {"float32"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", np.float16])
@pytest.mark.parametrize("rules", [RULES, []], ids=["packed", "float"])
@pytest.mark.sample(1)
def test_floats_become_the_dtype_as_when_loaded_in_it(dtype, rules):
    """A model that was made in the dtype runs the same program."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    narrow = prepare_for_inference(bj.quantize_model(model, rules), dtype)
    name = jnp.dtype(dtype).name
    assert float_dtypes(narrow) == {name}
    assert float_dtypes(model) == {"float32"}
    made = Transformer(CONFIG, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    made = prepare_for_inference(bj.quantize_model(made, rules))
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def run(model, ids, lengths):
        return model.enter_prompts(ids)[0], model.prefill(ids, lengths, 16)

    assert jax.eval_shape(run, narrow, ids, lengths) == jax.eval_shape(run, made, ids, lengths)
    assert jax.eval_shape(run, narrow, ids, lengths)[0].dtype == dtype


def test_a_model_keeps_its_tokenizer():
    pretrained = PretrainedModel(quantized(), "tokenizer")
    prepared = prepare_for_inference(pretrained, jnp.bfloat16)
    assert prepared.tokenizer == "tokenizer"
    assert hasattr(prepared.model.layers.attention, "qkv_proj")
    assert prepared.model.final_norm.scale.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [(".*v_proj", bj.Precision(8, 8)), (".*_proj", bj.Precision(4, 8))],
            "layers/attention: q_proj, k_proj, v_proj: layers to be joined differ: precision is W4A8",
        ),
        ([(".*up_proj", bj.Precision(4, 8))], "layers/ffn: gate_proj is no packed Linear"),
    ],
)
def test_layers_that_stay_apart_are_said(rules, message):
    with pytest.warns(UserWarning, match=message):
        prepare_for_inference(quantized(rules))


def test_float_and_joined_models_stay_as_they_are():
    model = prepare_for_inference(quantized())
    again = prepare_for_inference(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True))
    assert hasattr(prepare_for_inference(quantized([])).layers.attention, "q_proj")


@pytest.mark.parametrize("dtype", [jnp.int8, "uint32"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be a float dtype, such as bfloat16, got u?int"):
        prepare_for_inference(quantized(), dtype)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.sample(1)
def test_cpus_get_unpacked_weights_and_the_same_numbers(group_size):
    precision = bj.Precision(4, 8, group_size)
    model = quantized([("^layers/", precision), ("embed", bj.Precision(8))])
    prepared, packed = prepare_for_inference(model), prepare_for_inference(model, layout="planes")
    kinds = {
        name: {type(layer.kernel.get_value()) for _, layer in nnx.iter_modules(each) if isinstance(layer, bj.nn.Linear)}
        | {type(each.embed.embedding.get_value())}
        for name, each in {"prepared": prepared, "packed": packed, "model": model}.items()
    }
    assert kinds == {"prepared": {UnpackedArray}, "packed": {bj.BipolarArray}, "model": {bj.BipolarArray}}
    ids = jnp.asarray([[1, 2, 3, 4]])
    np.testing.assert_array_equal(prepared(ids), packed(ids))
    text = str(bj.explain_model(prepared, batch=1, length=64))
    assert "the weights are unpacked, one byte each" in text
    assert "in every call" not in text
    assert "in every call" in str(bj.explain_model(packed, batch=1, length=64))


def kernels(model: Transformer) -> dict[str, type]:
    """Kinds of the packed weights of a joined model, by layer."""
    attention, ffn = model.layers.attention, model.layers.ffn
    layers = {"qkv": attention.qkv_proj, "o": attention.o_proj, "gate_up": ffn.gate_up_proj, "down": ffn.down_proj}
    return {name: type(layer.kernel.get_value()) for name, layer in layers.items()}


def test_hopper_gets_integer_groups_as_tensor_cores_take_them():
    groups = [("^layers/", bj.Precision.parse("W4A8g16")), ("embed", bj.Precision(8))]
    rules = [("o_proj", bj.Precision.parse("W7A8")), ("down_proj", bj.Precision.parse("W4A16g16")), *groups]
    with interpreted(plgpu.InterpretGPUParams()):
        prepared = prepare_for_inference(quantized(rules))
        text = str(bj.explain_model(prepared, batch=2, length=64))
    planes, tensor_cores = bj.BipolarArray, PreparedArray
    expected = {"qkv": tensor_cores, "o": planes, "gate_up": tensor_cores, "down": planes}
    assert kernels(prepared) == expected
    assert isinstance(prepared.embed.embedding.get_value(), planes)
    assert prepared.layers.ffn.gate_up_proj.kernel.get_value().gated
    assert not prepared.layers.attention.qkv_proj.kernel.get_value().gated
    assert "weights of 4 bits in integer groups of 16 expanded in registers (estimated from tile sizes)" in text


def test_weights_that_planes_would_expand_in_every_call_belong_on_tensor_cores():
    belongs = {(8, 8), (8, 3), (4, 3), (4, 8)}
    pairs = [(w_bits, a_bits) for w_bits in range(1, 9) for a_bits in (1, 2, 3, 8, None)]
    found = {pair for pair in pairs if belongs_on_tensor_cores(*pair, has_groups=False)}
    assert found == belongs


@pytest.mark.parametrize(
    ("precision", "dtype", "kind"),
    [
        ("W4A16g16", jnp.bfloat16, PreparedArray),
        ("W4A16g16", jnp.float32, bj.BipolarArray),  # tensor cores multiply 16-bit floats
        ("W4A16g16f", jnp.bfloat16, PreparedArray),
        ("W4A16", jnp.bfloat16, bj.BipolarArray),
    ],
)
def test_hopper_gets_groups_for_float_activations_of_16_bits(precision, dtype, kind):
    with interpreted(plgpu.InterpretGPUParams()):
        prepared = prepare_for_inference(quantized([("^layers/", bj.Precision.parse(precision))]), dtype)
        text = str(bj.explain_model(prepared, batch=2, length=64))
    assert set(kernels(prepared).values()) == {kind}
    groups = "float groups" if precision.endswith("f") else "integer groups"
    assert (f"bfloat16 tensor cores, weights of 4 bits in {groups} of 16" in text) == (kind is PreparedArray)


@pytest.mark.parametrize(("precision", "kind"), [("W4A8", PreparedArray), ("W4A2", bj.BipolarArray)])
def test_hopper_gets_4_bits_with_one_scale_a_column_by_their_activations(precision, kind):
    with interpreted(plgpu.InterpretGPUParams()):
        prepared = prepare_for_inference(quantized([("^layers/", bj.Precision.parse(precision))]))
    assert set(kernels(prepared).values()) == {kind}


@pytest.mark.parametrize("tied", [True, False])
def test_output_layers_with_integer_groups_are_laid_out(tied):
    """A tied table is laid out whole, and its rows are looked up there; one that is only looked up stays planes."""
    ends = [("^(embed|lm_head)$", bj.Precision.parse("W6A16g16")), ("^layers/", bj.Precision.parse("W4A8"))]
    model = quantized(ends, tie_embeddings=tied)
    with interpreted(plgpu.InterpretGPUParams()):
        prepared = prepare_for_inference(model, jnp.bfloat16)
        text = str(bj.explain_model(prepared, batch=1, length=64).output)
    assert "bfloat16 tensor cores, weights of 6 bits in integer groups of 16 expanded in registers" in text
    assert "lays the weights out in every call" not in text
    assert isinstance(prepared.embed.embedding.get_value(), PreparedArray if tied else bj.BipolarArray)
    planes, ids = prepare_for_inference(model, jnp.bfloat16, layout="planes"), jnp.asarray([[1, 49, 3]])
    np.testing.assert_array_equal(prepared.embed(ids), planes.embed(ids))
    hidden = planes.embed(ids)
    np.testing.assert_array_equal(prepared.logits(hidden), planes.logits(hidden))


def test_hopper_gets_float_groups_in_one_form():
    """One layer has no offsets: the decode step takes one form, which holds the offsets of the others."""
    model = quantized([("^layers/", bj.Precision.parse("W4A8g16f"))])
    o_proj = model.layers.attention.o_proj
    kernel = dataclasses.replace(o_proj.kernel.get_value(), offset=None)
    o_proj.kernel = bj.nn.Packed(kernel)
    with interpreted(plgpu.InterpretGPUParams()):
        prepared = prepare_for_inference(model)
        text = str(bj.explain_model(prepared, batch=2, length=64))
    assert set(kernels(prepared).values()) == {PreparedArray}
    attention = prepared.layers.attention
    assert {layer.kernel.get_value().float_terms for layer in (attention.qkv_proj, attention.o_proj)} == {"offsets"}
    assert "weights of 4 bits in float groups of 16 expanded to float16 in registers" in text
    found = attention.o_proj.kernel.get_value()
    np.testing.assert_array_equal(found.dequantize(), kernel.dequantize())


def test_models_for_tensor_cores_give_the_same_numbers():
    model = quantized([("o_proj", bj.Precision.parse("W4A8")), ("^layers/", bj.Precision.parse("W4A8g16"))])
    prepared, planes = (prepare_for_inference(model, layout=layout) for layout in ("tensor_cores", "planes"))
    assert set(kernels(prepared).values()) == {PreparedArray}
    ids = jnp.asarray([[1, 2, 3, 4]])
    np.testing.assert_array_equal(prepared(ids), planes(ids))


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be one of planes, bytes, tensor_cores, or None, got 'packed'"):
        prepare_for_inference(quantized(), layout="packed")


def test_no_sequence_in_a_kernel_is_refused():
    with pytest.raises(ValueError, match="fused_sequences must be 1 or more, got 0"):
        prepare_for_inference(quantized(), fused_sequences=0)


def test_layers_of_another_backend_stay_packed():
    model = bj.quantize_model(Transformer(CONFIG, rngs=nnx.Rngs(0)), RULES, implementation="reference")
    prepared = prepare_for_inference(model)
    assert isinstance(prepared.layers.ffn.down_proj.kernel.get_value(), bj.BipolarArray)
    assert isinstance(prepared.embed.embedding.get_value(), bj.BipolarArray)


@pytest.mark.parametrize(
    ("flags", "plugin", "expected"),
    [
        ("", True, "--xla_gpu_enable_command_buffer=+FUSION,"),
        ("--xla_dump_to=x", True, "--xla_dump_to=x --xla_gpu_enable_command_buffer=+FUSION,"),
        ("--xla_gpu_enable_command_buffer=", True, "--xla_gpu_enable_command_buffer="),
        ("--xla_dump_to=x", False, "--xla_dump_to=x"),
    ],
)
def test_command_buffers_are_enabled_if_a_gpu_plugin_is_installed(monkeypatch, flags, plugin, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(xla_flags, "_has_cuda_plugin", lambda: plugin)
    assert xla_flags.enable_command_buffers() == plugin
    found = xla_flags.os.environ["XLA_FLAGS"]
    assert found.startswith(expected)
    assert found.endswith(" --xla_gpu_experimental_enable_fusion_autotuner=false") == plugin
    assert found.count("command_buffer") == expected.count("command_buffer")


@pytest.mark.parametrize(
    ("flags", "plugin", "expected"),
    [
        ("--a", True, "--a --xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"),
        ("--xla_gpu_autotune_level=4", True, "--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=false"),
        ("--a", False, "--a"),
    ],
)
def test_float_products_are_pinned_unless_the_user_chose(monkeypatch, flags, plugin, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(xla_flags, "_has_cuda_plugin", lambda: plugin)
    assert xla_flags.pin_float_products() == plugin
    assert xla_flags.os.environ["XLA_FLAGS"] == expected


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
def test_pinned_float_products_are_those_of_cublas_on_an_h200():
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8192, 576), (576, 1536)))
    untimed, _ = sm90_compile.compile_for_h200(jnp.matmul, lhs, rhs, options={"xla_gpu_autotune_level": 0})
    options = {name: json.loads(value) for name, value in xla_flags.PINNED.items()}
    pinned, _ = sm90_compile.compile_for_h200(jnp.matmul, lhs, rhs, options=options)
    assert [name in untimed.hlo for name in ("__triton", "__cublas")] == [True, False]
    assert [name in pinned.hlo for name in ("__triton", "__cublas")] == [False, True]


def test_public_names_are_in_one_place():
    for name in bj.models.__all__:
        assert getattr(bj.models, name).__name__ == name
    assert bj.models.generate is generate
    assert bj.models.__all__ == sorted(bj.models.__all__)
    assert set(bj.models.__all__) <= set(dir(bj.models))
    with pytest.raises(AttributeError, match="no attribute 'nothing': it has ChatTemplate, "):
        _ = bj.models.nothing

"""Low-bit formats of Hugging Face directories: integers bit-exact, logits of the float model, refusals by name."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from bipolar_jax.models.checkpoint import save_model
from bipolar_jax.models.inference.explain import explain_model
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_huggingface, load_pretrained
from bipolar_jax.models.loaders.huggingface.quantized.words import unpack_aligned, unpack_dense, unpack_either
from bipolar_jax.nn import Linear, layer_summaries, with_integer_groups
from tests.models.loaders import tiny_quantized as formats
from tests.support import tiny_checkpoints as tiny

IDS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 300
ORDERS = {64: np.random.default_rng(1).permutation(64), 96: np.random.default_rng(2).permutation(96)}


def gptq_config(**fields):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False} | fields


def group_config(weights, inputs=None, targets=("Linear",), **fields):
    return {"targets": list(targets), "weights": weights, "input_activations": inputs} | fields


def ct_config(weights, inputs=None, format="pack-quantized", **fields):
    groups = {"group_0": group_config(weights, inputs)}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups} | fields


def weights_of(**fields):
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"} | fields


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CASES = {
    "gptq v1": (gptq_config(), dict(of=formats.gptq), "W4A16g32f"),
    "gptq v2, act-order": (
        gptq_config(checkpoint_format="gptq_v2", desc_act=True),
        dict(of=formats.gptq, v2=True, order=ORDERS),
        "W4A16g32f",
    ),
    "gptq 3 bits": (gptq_config(bits=3), dict(of=formats.gptq, bits=3), "W3A16g32f"),
    "gptq 2 bits": (gptq_config(bits=2, group_size=16), dict(of=formats.gptq, bits=2, group=16), "W2A16g16f"),
    "gptq 8 bits, one group": (gptq_config(bits=8, group_size=-1), dict(of=formats.gptq, bits=8, group=96), "W8A16"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        dict(of=formats.awq),
        "W4A16g32f",
    ),
    "pack-quantized, dense 3 bits with zeros": (
        ct_config(weights_of(num_bits=3, symmetric=False, strategy="group", group_size=32)),
        dict(of=formats.compressed, bits=3, group=32, symmetric=False),
        "W3A16g32f",
    ),
    "pack-quantized, aligned 5 bits with zeros, W5A8": (
        ct_config(weights_of(num_bits=5, symmetric=False), TOKEN),
        dict(of=formats.compressed, bits=5, symmetric=False, packing=formats.aligned),
        "W5A8s",
    ),
    "pack-quantized, g_idx": (
        ct_config(weights_of(strategy="group", group_size=32)),
        dict(of=formats.compressed, group=32, order=ORDERS),
        "W4A16g32f",
    ),
    "int-quantized W8A8": (
        ct_config(weights_of(num_bits=8), TOKEN, "int-quantized"),
        dict(of=formats.compressed, bits=8, ints=True),
        "W8A8s",
    ),
    "int-quantized W4 with zeros": (
        ct_config(weights_of(symmetric=False, strategy="group", group_size=16), None, "int-quantized"),
        dict(of=formats.compressed, group=16, symmetric=False, ints=True),
        "W4A16g16f",
    ),
    "bitnet": ({"quant_method": "bitnet"}, dict(of=formats.bitnet, divides=True), "W1.58A8"),
    "bitnet, scales multiply": (
        {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
        dict(of=formats.bitnet, divides=False),
        "W1.58A8",
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, dict(of=formats.bitsandbytes), "W8A16"),
    "bitsandbytes, exact": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        dict(of=formats.bitsandbytes, exact=True),
        "W8A16",
    ),
}


def maker(of, seed=0, order=None, **options):
    """Makes layers; all of one input share `order`."""
    rng = np.random.default_rng(seed)
    if order is None:
        return lambda name, n, k: of(rng, n, k, **options)
    return lambda name, n, k: of(rng, n, k, order=order[k], **options)


def float_model(checkpoint, directory):
    return load_huggingface(tiny.write_huggingface(checkpoint, directory)).model


def packed_layers(model):
    return [model.layers.attention.q_proj, model.layers.attention.o_proj, model.layers.ffn.down_proj]


@pytest.mark.parametrize("bits", range(1, 9))
def test_words(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (3, 96)).astype(np.uint8)
    for unpack, pack in ((unpack_dense, formats.dense), (unpack_aligned, formats.aligned)):
        np.testing.assert_array_equal(unpack(pack(codes, bits), bits, 96), codes)
        np.testing.assert_array_equal(unpack_either(pack(codes, bits), bits, 96), codes)
    with pytest.raises(ValueError, match="96 integers of"):
        unpack_either(np.zeros((3, 40), np.int32), bits, 96)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample(len(CASES))
def test_weights_are_those_of_the_format(case, tmp_path):
    """Bit for bit, at the precision that the file states; the layers that are not quantized as stored."""
    config, options, precision = CASES[case]
    checkpoint = formats.write(tmp_path / "low", config, maker(**options))
    model = load_huggingface(tmp_path / "low").model
    assert {str(layer.precision) for layer in packed_layers(model)} == {precision}
    layers = {"self_attn.o_proj": model.layers.attention.o_proj, "mlp.up_proj": model.layers.ffn.up_proj}
    for name, kernels in numbers_of(layers).items():
        for index, kernel in enumerate(np.asarray(kernels)):
            stored = checkpoint.weights[f"model.layers.{index}.{name}.weight"].T
            if layers[name].order is not None:
                kernel = kernel[np.argsort(layers[name].order[index])]
            if case == "bitsandbytes":  # its reader multiplies twice, and rounds both products
                np.testing.assert_allclose(kernel, stored, rtol=2**-22)
            else:
                np.testing.assert_array_equal(kernel, stored)
    np.testing.assert_array_equal(model.lm_head.kernel[...], checkpoint.weights["lm_head.weight"].T)


@jax.jit
def numbers_of(layers):
    return {name: layer.kernel.get_value().dequantize() for name, layer in layers.items()}


# Every format; those beside each other are one program.
@pytest.mark.parametrize(
    "case",
    [
        *("gptq v2, act-order", "gptq v1", "awq", "pack-quantized, dense 3 bits with zeros"),
        *("int-quantized W8A8", "bitsandbytes", "bitnet", "bitnet, scales multiply"),
    ],
)
@pytest.mark.sample(8)
def test_logits_are_those_of_the_float_model(case, tmp_path):
    config, options, _ = CASES[case]
    checkpoint = formats.write(tmp_path / "low", config, maker(**options))
    model = load_pretrained(tmp_path / "low", activations=16).model
    expected = np.asarray(float_model(checkpoint, tmp_path / "float")(IDS))
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-5 * np.abs(expected).max())


def test_layers_of_one_order_join_and_say_so(tmp_path):
    """Bit for bit what they are apart, within the rounding of sums; saved and read again, too."""
    config, options, _ = CASES["gptq v2, act-order"]
    formats.write(tmp_path / "low", config, maker(**options))
    loaded = load_pretrained(tmp_path / "low", activations=8)
    prepared = prepare_for_inference(loaded.model)
    assert hasattr(prepared.layers.attention, "qkv_proj")
    explanation = str(explain_model(prepared, 1, 8))
    assert "its inputs are gathered first, in the order of their groups" in explanation
    assert "not one kernel for all layers: the qkv projections gather their inputs" in explanation
    save_model(tmp_path / "low.safetensors", loaded)
    again = load_pretrained(tmp_path / "low.safetensors").model
    np.testing.assert_array_equal(again.layers.ffn.up_proj.order[...], loaded.model.layers.ffn.up_proj.order[...])
    expected = np.asarray(again(IDS))
    np.testing.assert_allclose(np.asarray(prepared(IDS)), expected, atol=2e-3 * np.abs(expected).max())


def test_orders_that_differ_keep_layers_apart(tmp_path):
    rng = np.random.default_rng(0)
    formats.write(
        tmp_path, gptq_config(desc_act=True), lambda name, n, k: formats.gptq(rng, n, k, order=rng.permutation(k))
    )
    with pytest.warns(UserWarning, match="read their inputs in different orders"):
        prepared = prepare_for_inference(load_huggingface(tmp_path).model)
    assert hasattr(prepared.layers.attention, "q_proj")


def test_layers_that_differ_become_runs_and_activations_are_a_choice(tmp_path):
    """An unquantized layer, two widths in one file, and biases; saved and read again, converted to integer groups."""
    few, many = (weights_of(num_bits=bits, strategy="group", group_size=32) for bits in (4, 6))
    groups = {"all": group_config(few), "down": group_config(many, targets=[r"re:.*layers\.[12]\.mlp\.down_proj"])}
    config = {"format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}

    def make(name, n, k):
        bits = 6 if name.endswith("down_proj") and ".0." not in name else 4
        return formats.compressed(np.random.default_rng(n), n, k, bits=bits, group=32)

    checkpoint = formats.write(tmp_path / "low", config, make, float_layers=["layers.2.self_attn"], arch="qwen2")
    loaded = load_pretrained(tmp_path / "low", activations=8)
    assert loaded.model.runs == (range(1), range(1, 2), range(2, 3))
    precisions = {layer.path: layer.precision for layer in layer_summaries(loaded.model)}
    assert precisions["layers/1/ffn/down_proj"] == "W6A8g32f"
    assert precisions["layers/0/ffn/down_proj"] == precisions["layers/2/ffn/up_proj"] == "W4A8g32f"
    assert not isinstance(loaded.model.block(2).attention.q_proj, Linear)
    expected = np.asarray(float_model(checkpoint, tmp_path / "float")(IDS))
    exact = load_pretrained(tmp_path / "low").model
    np.testing.assert_allclose(np.asarray(exact(IDS)), expected, atol=2e-4 * np.abs(expected).max())
    converted, report = with_integer_groups(exact)
    assert max(max(layer.errors) for layer in report.layers) < 0.02
    assert converted.block(0).ffn.up_proj.precision.scales == "integer"


def test_quantized_experts_are_stacks_of_the_stored_integers(tmp_path):
    """Act-order in one expert of each layer, too; experts that differ in bits are refused."""
    config, order = gptq_config(desc_act=True), np.random.default_rng(1).permutation(tiny.HIDDEN)

    def make(name, n, k):
        has_order = "experts.1." in name and k == tiny.HIDDEN
        return formats.gptq(np.random.default_rng(n), n, k, order=order if has_order else None)

    experts = formats.with_experts(tiny.make(), 3, 2, 32)
    checkpoint = formats.write(tmp_path / "low", config, make, model=experts)
    model = load_huggingface(tmp_path / "low").model
    assert model.runs == (range(1), range(1, 3))
    assert type(model.layers["1-2"].ffn.router.kernel) is nnx.Param
    experts_of_run = model.layers["1-2"].ffn.experts
    for name in ("gate_proj", "down_proj"):
        layer = getattr(experts_of_run, name)
        kernels = np.asarray(layer.kernel.get_value().dequantize())
        for layer_index, expert in ((0, 1), (1, 0), (1, 1)):
            stored = checkpoint.weights[f"model.layers.{1 + layer_index}.mlp.experts.{expert}.{name}.weight"].T
            order = np.argsort(layer.order[layer_index, expert]) if name == "gate_proj" else slice(None)
            np.testing.assert_array_equal(kernels[layer_index, expert][order], stored)
    assert experts_of_run.down_proj.order is None
    formats.write(tmp_path / "some", config, make, model=experts, float_layers=["2.mlp.experts.0."])
    with pytest.raises(ValueError, match="experts of layer 2 are 2 of 3 packed in layers/ffn/experts/down_proj/kernel"):
        load_huggingface(tmp_path / "some")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quantized by fp8, which is not served: its weights are floats"),
        ({"quant_method": "mxfp4"}, "quantized by mxfp4"),
        ({"quant_method": "nobody"}, "quant_method is 'nobody', expected gptq, awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "to nf4, whose 16"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        (gptq_config(bits=5), "bits is 5, expected 2, 3, 4, 8"),
        (gptq_config(group_size=0), "group_size is 0"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (gptq_config(dynamic={"+:.*down": {"bits": 8}}), "settings of their own"),
        (ct_config(weights_of(), format="float-quantized"), "format is 'float-quantized'"),
        (ct_config(weights_of(type="float", num_bits=8)), "8 bits of type 'float'"),
        (ct_config(weights_of(), TOKEN | {"dynamic": False, "strategy": "tensor"}), "static scales.*activations=8"),
        (ct_config(weights_of(strategy="block")), "strategy is 'block'"),
        (ct_config(weights_of(), config_groups={"a": group_config(weights_of(), targets=["re:(a+)+b"])}), "targets is"),
        (ct_config(weights_of(), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    ],
)
def test_what_is_not_served_is_refused_before_a_tensor_is_read(config, message, tmp_path):
    directory = tiny.write_huggingface(tiny.make(), tmp_path)
    (directory / "model.safetensors").unlink()
    fields = tiny.hf_config(tiny.make()) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_huggingface(directory)


def test_activations_of_what_is_not_quantized(tmp_path):
    directory = tiny.write_huggingface(tiny.make(), tmp_path)
    with pytest.raises(ValueError, match="is not quantized, so it takes no activations=8"):
        load_huggingface(directory, activations=8)
    with pytest.raises(ValueError, match="1 to 8 bits, or 16"):
        load_huggingface(directory, activations=9)


@pytest.mark.parametrize("case", ["gptq v2, act-order", "awq", "pack-quantized, dense 3 bits with zeros", "bitnet"])
def test_damaged_tensors_are_refused(case, tmp_path):
    """Missing parts, other shapes, dtypes and values: an error that names the directory, before large allocations."""
    config, options, _ = CASES[case]
    formats.write(tmp_path, config, maker(**options))
    path = tmp_path / "model.safetensors"
    whole = safetensors.numpy.load_file(path)
    prefix = "model.layers.1.self_attn.o_proj."
    rng = np.random.default_rng(0)
    for name in [name for name in whole if name.startswith(prefix) and not name.endswith("bias")]:
        array = whole[name]
        variants = [array[:-1], array[..., None], array.astype(np.float64)]
        if name.endswith("scales"):
            variants.append(np.full_like(array, np.nan))
        if array.dtype.kind == "i" and array.ndim == 1:
            variants += [array + 1, np.full_like(array, -5), rng.permutation(array)[::-1] * 0]
        if name.endswith(".weight"):
            variants.append(np.full_like(array, 255))
        for variant in variants:
            safetensors.numpy.save_file(whole | {name: np.ascontiguousarray(variant)}, path)
            with pytest.raises(ValueError, match=str(tmp_path)):
                load_huggingface(tmp_path)
        if not name.endswith(("g_idx", "weight_shape")):
            safetensors.numpy.save_file({key: value for key, value in whole.items() if key != name}, path)
            with pytest.raises(ValueError, match=str(tmp_path)):
                load_huggingface(tmp_path)

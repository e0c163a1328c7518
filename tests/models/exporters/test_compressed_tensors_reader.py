"""Exported directories, read by compressed-tensors and transformers: the same codes, weights and logits.

Skipped where compressed-tensors is not installed, as in the project's own environment: it needs torch and 5 GB. To run
it, `pip install torch compressed-tensors transformers` (seen with 2.14.1, 0.20.1 and 5.24.0).
"""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.models.exporters import export_compressed_tensors
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.nn import quantize_model
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.quantize import Precision
from tests.models.loaders import tiny_quantized as formats
from tests.models.loaders.test_quantized_formats import ct_config, maker, weights_of
from tests.support import tiny_checkpoints as tiny

for _package in ("torch", "compressed_tensors", "transformers"):
    pytest.importorskip(_package, reason=f"{_package} is not installed (see the module docstring)")

# transformers says that it takes the config's quantization_config, not the argument's.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
IDS = np.array([[5, 30, 17, 42, 8, 7, 9], [1, 2, 3, 4, 5, 6, 7]], np.int32)
LAYERS = {
    **{f"self_attn.{part}_proj": ("attention", f"{part}_proj") for part in "qkvo"},
    **{f"mlp.{part}_proj": ("ffn", f"{part}_proj") for part in ("gate", "up", "down")},
}


def with_zeros(folder, rules):
    """A Qwen2 with biases, rounded to grids with zeros."""
    loaded = load_huggingface(tiny.write_huggingface(tiny.make("qwen2", tied=True), folder / "float"))
    return loaded.with_model(quantize_model(loaded.model, rules))


def symmetric(folder, activations=None, **options):
    """A Qwen2 as a compressed-tensors directory without zeros has it."""
    strategy = {"strategy": "group", "group_size": options["group"]} if "group" in options else {"strategy": "channel"}
    config = ct_config(weights_of(num_bits=options["bits"], symmetric=True, **strategy), activations)
    formats.write(folder / "low", config, maker(of=formats.compressed, **options), arch="qwen2")
    return load_huggingface(folder / "low")


def theirs(directory, **options):
    """transformers' model."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(torch.tensor(IDS.astype(np.int64))).logits.numpy()


def decompressed(directory):
    """By name of a layer: codes and float32 weights, by compressed-tensors."""
    import torch
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    fields = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(fields)
    stored, found = load_file(directory / "model.safetensors"), {}
    for name in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        groups = config.config_groups.values()
        scheme = next(group for group in groups if group.targets == ["Linear"] or name in group.targets)
        tensors = {key.removeprefix(f"{name}."): each for key, each in stored.items() if key.startswith(f"{name}.")}
        bits, shape = scheme.weights.num_bits, tensors["weight_shape"]
        codes = unpack_from_int32(tensors["weight_packed"], bits, shape) + (1 << bits - 1)
        # In the scale's own dtype the weights would be rounded once more.
        tensors["weight_scale"] = tensors["weight_scale"].to(torch.float32)
        weights = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
        found[name] = codes.numpy().astype(np.uint8), weights.numpy()
    return found


CASES = {
    "8, 3 and 5 bits with zeros": [
        ("down_proj", Precision(8, None, calibration="minmax")),
        ("o_proj", Precision(3, None, 32, "minmax", "float")),
        ("layers/", Precision(5, 8, 32, "minmax", "float", a_symmetric=True)),
    ],
    "2, 4, 6 and 7 bits with zeros": [
        ("down_proj", Precision(7, None, calibration="minmax")),
        ("o_proj", Precision(6, None, 32, "minmax", "float")),
        ("gate_proj", Precision(2, None, calibration="minmax")),
        ("up_proj", Precision(2, None, 32, "minmax", "float")),
        ("layers/", Precision(4, 8, 32, "minmax", "float")),
    ],
    "4 bits": {"bits": 4, "group": 32},
    "6 bits": {"bits": 6},
}


@pytest.mark.parametrize("case", CASES)
def test_codes_and_weights_are_those_of_its_own_reader(case, tmp_path):
    """Codes exactly; weights exactly without zeros, else within a rounding of float32: d (q - z) is d v + o here."""
    of = CASES[case]
    packed = with_zeros(tmp_path, of) if isinstance(of, list) else symmetric(tmp_path, **of)
    export_compressed_tensors(tmp_path / "out", packed)
    found = decompressed(tmp_path / "out")
    assert len(found) == 7 * tiny.LAYERS
    for index in range(tiny.LAYERS):
        block = packed.model.block(index)
        for name, path in LAYERS.items():
            array = layer_at(block, "/".join(path)).kernel.get_value()
            codes, weights = found[f"model.layers.{index}.{name}"]
            np.testing.assert_array_equal(codes, array.codes(), err_msg=name)
            ours = np.asarray(array.dequantize()).T
            if isinstance(of, list):
                np.testing.assert_allclose(weights, ours, rtol=0, atol=2.0**-23 * np.abs(ours).max(), err_msg=name)
            else:
                np.testing.assert_array_equal(weights, ours, err_msg=name)


def test_logits_are_those_of_transformers_with_dequantized_weights(tmp_path):
    import transformers

    packed = with_zeros(tmp_path, [("layers/", Precision(4, None, 32, "minmax", "float"))])
    export_compressed_tensors(tmp_path / "out", packed)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    logits = theirs(tmp_path / "out", quantization_config=config)
    ours = np.asarray(packed.model(IDS))
    np.testing.assert_allclose(logits, ours, rtol=0, atol=2e-5 * np.abs(ours).max())


def test_logits_with_rounded_tokens_are_those_of_transformers(tmp_path):
    packed = symmetric(tmp_path, {**DYNAMIC, "symmetric": False}, bits=4, group=32)
    export_compressed_tensors(tmp_path / "out", packed)
    logits, ours = theirs(tmp_path / "out"), np.asarray(packed.model(IDS))
    floats = np.asarray(load_huggingface(tmp_path / "out", activations=16).model(IDS))
    # A number next to the middle of two codes falls to either side, by the rounding of float32.
    assert np.linalg.norm(logits - ours) < 0.1 * np.linalg.norm(floats - ours)


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_tokens_are_rounded_as_compressed_tensors_rounds_them(is_symmetric):
    """Where a number lies between two codes we take the larger, it takes the even one: -127 and -128 of -127.5.

    That is what becomes of a token's largest number, if it is negative, on symmetric grids.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    arguments = QuantizationArgs(**{**DYNAMIC, "symmetric": is_symmetric})
    tokens = torch.tensor(x)[None]
    scale, zero = compute_dynamic_scales_and_zp(tokens, arguments, torch.nn.Linear(64, 64))
    steps = scale.numpy().reshape(-1, 1)
    expected = fake_quantize(tokens, scale, zero, arguments).numpy()[0] / steps
    number_format = Precision(4, 8, a_symmetric=is_symmetric).a_format
    found = np.asarray(quantize_tokens(jnp.asarray(x), number_format).dequantize(number_format)) / steps
    same = np.abs(found - expected) < 1e-4
    assert same.mean() > 0.99
    in_the_middle = np.abs(x / steps - np.floor(x / steps) - 0.5) < 1e-4
    assert in_the_middle[~same].all()
    assert same.all() or is_symmetric

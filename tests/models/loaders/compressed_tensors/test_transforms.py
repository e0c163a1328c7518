"""compressed-tensors' transform_config: R1 and R2 in weights, R3 and R4 at run time; what is refused by name."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.models.exporters import export_compressed_tensors
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.nn import quantize_model
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.quantize import Precision
from tests.models.loaders import tiny_quantized as formats
from tests.models.loaders.test_quantized_formats import IDS, ct_config, float_model, maker, weights_of
from tests.support import tiny_checkpoints as tiny

BLOCK = 32


def args(location, target, **fields):
    return {"targets": [target], "location": location} | fields


def group(*entries, kind="hadamard", **fields):
    return {"type": kind, "apply": list(entries)} | fields


# As llm-compressor's SpinQuant writes them, but for fields with their defaults.
R1 = group(
    args("weight_output", "re:.*embed_tokens$"),
    args("weight_output", "re:.*o_proj$"),
    args("weight_input", "re:.*q_proj$", inverse=True),
    kind="random-hadamard",
    randomize=True,
)
R2 = group(args("weight_output", "re:.*v_proj$"), args("weight_input", "re:.*o_proj$", inverse=True), head_dim=16)
R3 = group(args("q_attn", "re:.*self_attn$"), args("k_cache", "re:.*self_attn$"))
R4 = group(
    args("input", "re:.*down_proj$"),
    args("weight_input", "re:.*down_proj$", inverse=True),
    head_dim=BLOCK,
    precision="torch.float32",
)


def write(directory, groups):
    """A checkpoint of all but the transforms' matrices; returns the float model of its stored weights."""
    config = ct_config(weights_of(strategy="group", group_size=32), transform_config={"config_groups": groups})
    return formats.write(directory, config, maker(of=formats.compressed, group=32))


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def with_tensors(directory, tensors) -> None:
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | tensors, path)


def test_rotations_at_run_time_are_those_of_the_config(tmp_path):
    """R1 and R2 leave the stored weights as they are; x H times the stored weights of down, with H from the paper."""
    checkpoint = write(tmp_path / "low", {"R1": R1, "R2": R2, "R3": R3, "R4": R4})
    matrix = sylvester(BLOCK).astype(np.float32)
    with_tensors(tmp_path / "low", {"model.layers.0.mlp.down_proj.R4_input.weight": matrix})
    model = load_huggingface(tmp_path / "low").model
    assert (model.config.rotation.ffn, model.config.rotation.stream) == (hadamard(tiny.FFN, block=BLOCK), None)
    assert model.config.key_rotation(4) == hadamard(tiny.HEAD_DIM)
    weights = dict(checkpoint.weights)
    for name in (name for name in weights if "down_proj" in name):
        blocks = weights[name].reshape(len(weights[name]), -1, BLOCK) @ sylvester(BLOCK) / BLOCK**0.5
        weights[name] = blocks.reshape(weights[name].shape).astype(np.float32)
    expected = np.asarray(float_model(dataclasses.replace(checkpoint, weights=weights), tmp_path / "float")(IDS))
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=2e-4 * np.abs(expected).max())


def test_rotations_at_run_time_are_exported_and_read_back(tmp_path):
    loaded = load_huggingface(tiny.write_huggingface(tiny.make(), tmp_path / "float"))
    packed = quantize_model(loaded.model, [("down_proj", Precision(4, None, 32, "minmax", "float"))])
    rotated = packed.with_rotation(Rotation(ffn=hadamard(tiny.FFN, block=BLOCK)))
    export_compressed_tensors(tmp_path / "out", loaded.with_model(rotated))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (entry, _) = fields["transform_config"]["config_groups"]["R4"]["apply"]
    assert entry == args("input", "re:.*down_proj$", inverse=False, ignore=[])
    again = load_huggingface(tmp_path / "out").model
    assert again.config == rotated.config
    for first, second in zip(jax.tree.leaves(again), jax.tree.leaves(rotated), strict=True):
        np.testing.assert_array_equal(first, second)
    whole = packed.with_rotation(Rotation(ffn=hadamard(tiny.FFN)))  # 12 * 8 numbers
    with pytest.raises(ValueError, match='in blocks of 96 at run time.*rotate with block=256, or with "foldable"'):
        export_compressed_tensors(tmp_path / "other", loaded.with_model(whole))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"R4": R4 | {"type": "random-hadamard"}}, "'R4' of type 'random-hadamard' rotates inputs at run time by a"),
        ({"R4": R4 | {"randomize": True}}, 'only the type "hadamard" is served there, without randomize'),
        ({"R4": R4 | {"head_dim": None}}, "rotates 96 numbers in blocks of 96, which are no powers of two"),
        ({"R4": R4 | {"head_dim": 64}}, "rotates 96 numbers in blocks of 64"),
        (
            {"V": group(args("input", "Linear", ignore=["lm_head"]))},
            "'V' rotates inputs of 'model.layers.0.mlp.gate_proj' at run time",
        ),
        ({"R4": group(args("input", r"re:.*\.[01]\.mlp\.down_proj$"))}, "rotates inputs of 2 of 3 blocks"),
        ({"U": group(args("output", "re:.*up_proj$", inverse=True))}, "'U' rotates outputs of layers at run time"),
        ({"R3": group(args("k_cache", "re:.*self_attn$"))}, "rotates queries and keys in different ways"),
        ({"a": R4, "b": R4}, "2 transforms rotate inputs"),
        ({"a": group(args("somewhere", "Linear"))}, "location is 'somewhere', expected weight_input"),
        ({"R4": group(args("input", "re:(a+)+b"))}, "targets is"),
        (
            {"R4": group(args("input", "re:.*down_proj$", side="left"))},
            "a field 'side': its fields are .'ignore', 'inv",
        ),
        ({"R4": R4 | {"blocks": 3}}, "with a field 'blocks'"),
        ({"R4": {"type": "hadamard", "apply": 3}}, "apply is 3, expected a list of objects"),
    ],
)
def test_what_is_not_served_is_refused_by_name(groups, message, tmp_path, checkpoint):
    directory = checkpoint
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"]["transform_config"] = {"config_groups": groups}
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_huggingface(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("low")
    write(directory, {})
    return directory


def test_another_matrix_than_the_one_stated_is_refused(tmp_path):
    write(tmp_path, {"R4": R4})
    matrix = sylvester(BLOCK).astype(np.float32)
    matrix[3, 5] *= -1
    name = "model.layers.1.mlp.down_proj.R4_input.weight"
    for stored, message in ((matrix, "another matrix than Sylvester's"), (matrix[:-1], r"shape \[31, 32\]")):
        with_tensors(tmp_path, {name: stored})
        with pytest.raises(ValueError, match=message):
            load_huggingface(tmp_path)

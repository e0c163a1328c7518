"""experiments/bench/language_models/random_gguf.py: files of a published layout that load with their integers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders import load_gguf
from configs.bench import llm as llm_config
from configs.bench import random_gguf as random_gguf_config
from experiments.bench import llm
from experiments.bench.language_models import random_gguf
from experiments.support.workdir import RESULT_NAME, read_json


@pytest.mark.parametrize(("qk_norm", "kind"), [(True, "Q1_0"), (False, "Q4_0")])
def test_files_load_with_their_integers(qk_norm, kind, tmp_path, monkeypatch):
    preset = TransformerConfig(300, 128, 9, 2, 1, 64, 128, 64, qk_norm=qk_norm, tie_embeddings=qk_norm, eos_ids=(299,))
    monkeypatch.setattr(random_gguf, "preset", lambda name: preset)
    shape = dataclasses.replace(preset, num_layers=2)
    config = random_gguf_config.get_config()
    config.type, config.layers = kind, 2
    random_gguf.main(config, tmp_path)
    loaded = load_gguf(tmp_path / "model.gguf", activations=8)
    assert loaded.model.config == shape
    kernel = loaded.model.layers.ffn.down_proj.kernel.get_value()
    assert (kernel.bits, kernel.group_size) == ({"Q1_0": 1, "Q4_0": 4}[kind], {"Q1_0": 128, "Q4_0": 32}[kind])
    assert np.asarray(kernel.scale).min() > 0
    assert np.isclose(
        np.asarray(load_gguf(tmp_path / "model.gguf").model.layers.ffn.up_proj.kernel[...]).std(), 128**-0.5, rtol=0.05
    )
    assert loaded.encode("abc") == [loaded.tokenizer.token_to_id("ab"), loaded.tokenizer.token_to_id("c")]


@pytest.fixture(scope="module")
def one_bit_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_bit")
    shape = TransformerConfig(300, 128, 1, 2, 1, 64, 128, 64, qk_norm=True, tie_embeddings=True, eos_ids=(299,))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(random_gguf, "preset", lambda name: shape)
        random_gguf.main(random_gguf_config.get_config(), folder)
    return folder / "model.gguf"


def test_the_benchmark_times_a_file_with_its_integers(one_bit_file, tmp_path, monkeypatch):
    timed = {}

    def measure(model, name, workload, with_profile, result, *_):
        timed[name] = model
        result["models"][name]["workloads"][workload.name] = {"error": "not timed"}

    monkeypatch.setattr(llm, "_measure_workload", measure)
    config = llm_config.get_config()
    config.update(model=str(one_bit_file), precisions="A16,A8", baselines="bf16", workloads="1x4+2", profile="")
    llm.main(config, tmp_path)
    assert list(read_json(tmp_path / RESULT_NAME)["models"]) == ["A16", "A8", "bf16"]
    assert str(timed["A16"].layers.ffn.gate_up_proj.precision) == "W1A16g128f"
    assert str(timed["A8"].layers.attention.qkv_proj.precision) == "W1A8g128f"
    assert timed["bf16"].config.qk_norm
    assert timed["bf16"].layers.ffn.up_proj.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precisions": "W1A8"}, "names W1A8: the weights of DIR/model.gguf are the file's, give its activations"),
        ({"precisions": "A9"}, "names A9"),
        ({"precisions": "A8", "embed_bits": 8}, "config.embed_bits is of random weights: leave it out for the file"),
        ({"precisions": "A8", "mesh.model": 2}, "is timed on one device"),
    ],
)
def test_settings_of_random_weights_are_refused_for_files(fields, message, tmp_path):
    config = llm_config.get_config()
    config.model = "DIR/model.gguf"
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        llm.main(config, tmp_path)


def test_other_types_are_refused(tmp_path):
    config = random_gguf_config.get_config()
    config.type = "Q4_K"
    with pytest.raises(ValueError, match="config.type is 'Q4_K', choose one of Q1_0"):
        random_gguf.main(config, tmp_path)

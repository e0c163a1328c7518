"""experiments/bench/language_models/random_gguf.py: files of a published layout that load with their integers."""

from __future__ import annotations

import numpy as np
import pytest

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders import load_gguf
from configs.bench import random_gguf as random_gguf_config
from experiments.bench.language_models import random_gguf


@pytest.mark.parametrize(("qk_norm", "kind"), [(True, "Q1_0"), (False, "Q4_0")])
def test_files_load_with_their_integers(qk_norm, kind, tmp_path, monkeypatch):
    shape = TransformerConfig(300, 128, 2, 2, 1, 64, 128, 64, qk_norm=qk_norm, tie_embeddings=qk_norm, eos_ids=(299,))
    monkeypatch.setattr(random_gguf, "preset", lambda name: shape)
    config = random_gguf_config.get_config()
    config.type = kind
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


def test_other_types_are_refused(tmp_path):
    config = random_gguf_config.get_config()
    config.type = "Q4_K"
    with pytest.raises(ValueError, match="config.type is 'Q4_K', choose one of Q1_0"):
        random_gguf.main(config, tmp_path)

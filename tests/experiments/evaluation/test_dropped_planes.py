"""experiments/dropped_planes.py on a tiny checkpoint: figures, what is not measured again, errors."""

from __future__ import annotations

import json

import pytest

import bipolar_jax as bj
from bipolar_jax.models.checkpoint import save_model
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.loaders import load_pretrained
from configs.compression import dropped_planes as dropped_planes_config
from experiments import dropped_planes
from experiments.support import workdir
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")


def test_one_file_is_scored_at_every_precision(tmp_path, monkeypatch):
    folder = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(seed=0), tmp_path / "float")
    pretrained = load_pretrained(folder)
    packed = pretrained.with_model(bj.quantize_model(pretrained.model, [("layers/", "W6A8")]))
    save_model(tmp_path / "W6A8.safetensors", packed)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    config = dropped_planes_config.get_config()
    config.models, config.against = str(tmp_path / "W6A8.safetensors"), str(folder)
    config.text, config.windows, config.window_length, config.bits = str(tmp_path / "text.txt"), 2, 16, "8,6,2"
    dropped_planes.main(config, tmp_path)
    rows = json.loads((tmp_path / workdir.RESULT_NAME).read_text())["rows"]
    assert list(rows) == [str(folder), f"{config.models} at 6 bits", f"{config.models} at 2 bits"]
    ids = pretrained.tokenizer.encode((tmp_path / "text.txt").read_text(), add_special_tokens=False).ids
    values = []
    for bits, row in zip((None, None, 2), rows.values(), strict=True):
        model = pretrained if len(values) == 0 else load_pretrained(config.models, bits=bits)
        values.append(perplexity(model.model, ids, windows=2, window_length=16).perplexity)
        assert row["perplexity"] == values[-1]
        assert row["growth"] == pytest.approx(values[-1] / values[0] - 1)
    assert (tmp_path / "dropped_planes.png").stat().st_size > 1000
    monkeypatch.setattr(dropped_planes, "scored_windows", None)
    dropped_planes.main(config, tmp_path)  # nothing is measured again
    monkeypatch.undo()
    config.models = str(folder)
    with pytest.raises(ValueError, match="is not packed, so it cannot be read at 8 bits"):
        dropped_planes.main(config, tmp_path / "other")
    config.models = ""
    with pytest.raises(ValueError, match="nothing to read"):
        dropped_planes.main(config, tmp_path / "other")

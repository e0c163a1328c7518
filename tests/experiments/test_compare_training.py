"""experiments/compare_training.py on results of tiny runs."""

from __future__ import annotations

import json

import pytest

from configs import compare_training as compare_config
from experiments import compare_training
from experiments.support.workdir import RESULT_NAME


def write_run(folder, name, losses, packed=True, **settings):
    """Writes the fields of a result of experiments/train.py that are read."""
    settings = {"name": name, "rules": [], "seed": 0, "data_sha256": "d", "steps": 20, "batch_size": 4} | settings
    settings |= {"window_length": 16, "evaluate_windows": 4}
    evaluations = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)]
    result = {"settings": settings, "evaluations": evaluations, "environment": {"device": "cpu: cpu"}}
    if packed:
        result["packed"] = {"loss": losses[-1]}
    (folder / name).mkdir()
    (folder / name / RESULT_NAME).write_text(json.dumps(result))


def config_of(folder, *names):
    config = compare_config.get_config()
    config.runs, config.baseline = ",".join(str(folder / name) for name in names), names[0]
    return config


def test_losses_are_compared_with_the_final_and_the_least_loss(tmp_path):
    write_run(tmp_path, "bf16", [9.0, 1.5, 1.75])
    write_run(tmp_path, "w2a2", [9.0, 2.0, 1.625])
    config = config_of(tmp_path, "bf16", "w2a2")
    compare_training.main(config, tmp_path / "out")
    runs = json.loads((tmp_path / "out" / RESULT_NAME).read_text())["runs"]
    assert runs["bf16"]["least"] == 1.5
    assert runs["bf16"]["least_at_step"] == 10
    assert runs["w2a2"]["above_final"] == -0.125
    assert runs["w2a2"]["above_least"] == 0.125
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    config.mesh.model = 2
    compare_training.main(config, tmp_path / "mesh")
    assert (tmp_path / "mesh" / RESULT_NAME).read_bytes() == (tmp_path / "out" / RESULT_NAME).read_bytes()


def test_incomparable_runs_are_rejected(tmp_path):
    write_run(tmp_path, "bf16", [9.0, 1.5])
    write_run(tmp_path, "longer", [9.0, 1.5], steps=40)
    write_run(tmp_path, "stopped", [9.0, 1.5], packed=False)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="longer has steps=40, bf16 has 20: train both with the same"):
        compare_training.main(config_of(tmp_path, "bf16", "longer"), out)
    with pytest.raises(ValueError, match="stopped stopped at step 10: run its command again"):
        compare_training.main(config_of(tmp_path, "bf16", "stopped"), out)
    with pytest.raises(FileNotFoundError, match="name workdirs of experiments/train.py"):
        compare_training.main(config_of(tmp_path, "bf16", "none"), out)
    config = config_of(tmp_path, "bf16")
    config.mesh.data = 3
    with pytest.raises(ValueError, match="is 3 devices, and there are 2"):
        compare_training.main(config, out)
    config = config_of(tmp_path, "bf16")
    config.baseline = "w1a1"
    with pytest.raises(ValueError, match="baseline w1a1 is not among the runs: choose one of bf16"):
        compare_training.main(config, out)

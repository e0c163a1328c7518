"""experiments/train.py on meshes of one process: the losses of one device to rounding, and checkpoints for any mesh."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import train
from tests.experiments.distributed import tiny_mesh
from tests.support.tiny_training import losses, without_evaluation

pytestmark = pytest.mark.usefixtures("compiled_programs")


def config_of(data: int, model: int, steps: int = 6):
    config = tiny_mesh.get_config()
    config.mesh.data, config.mesh.model, config.steps, config.checkpoint_every = data, model, steps, 3
    return config


@pytest.mark.covered("models/sharding/test_training.py, and runs on one device")
def test_losses_are_those_of_one_device_and_any_mesh_resumes(tiny_text, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_TEXT", str(tiny_text))
    without_evaluation(monkeypatch)
    train.main(config_of(1, 1), tmp_path / "one")
    expected = [row["loss"] for row in losses(tmp_path / "one")]
    for mesh in ((2, 1), (1, 2)):
        folder = tmp_path / "x".join(map(str, mesh))
        train.main(config_of(*mesh), folder)
        np.testing.assert_allclose([row["loss"] for row in losses(folder)], expected, rtol=1e-3)
    # The checkpoint of step 3 goes on elsewhere, which checks that arrays are stored whole.
    newest = tmp_path / "2x1" / "checkpoints" / "6"
    newest.rename(tmp_path / "moved")
    train.main(config_of(1, 2), tmp_path / "2x1")
    np.testing.assert_allclose([row["loss"] for row in losses(tmp_path / "2x1")], expected, rtol=1e-3)


def test_impossible_meshes_are_refused_before_anything_is_written(tiny_text, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_TEXT", str(tiny_text))
    with pytest.raises(ValueError, match="config.mesh.data=2 times config.mesh.model=2 is 4 devices, and there are 2"):
        train.main(config_of(2, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()

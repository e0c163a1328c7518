"""Programs on a mesh of eight CPU devices, by their command lines, give what they give on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.models.checkpoint import save_model
from bipolar_jax.models.loaders import load_pretrained
from experiments.distributed import mesh as meshes
from experiments.distributed.mesh import writer_on_mesh
from experiments.support.workdir import RESULT_NAME
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")
ROOT = Path(__file__).resolve().parents[3]
DEVICES = 8
# Fields of each program's config for a tiny model, whose files lie in the folder {inputs}.
SCORED = ("text={inputs}/text.txt", "windows=4", "window_length=16")
WRITTEN = ("texts=8", "batch_size=8", "length=24", "prefix=")
PROGRAMS = {
    "dropped_planes": (
        "compression/dropped_planes",
        ("models={inputs}/W6A8.safetensors", "against={inputs}/float", "bits=6,2", *SCORED),
    ),
    "sample_text": ("sample_text", ("model={inputs}/W6A8.safetensors", *WRITTEN)),
    "sample_text of floats": ("sample_text", ("model={inputs}/float", *WRITTEN)),
    "allocate": (
        "compression/allocate",
        (
            "model={inputs}/float",
            "precisions=W2A8,W5A8",
            "budget=W2A8,W5A8",
            "calibration_text={inputs}/ids.npy",
            "calibration_windows=8",
            "calibration_length=16",
            "sensitivity_windows=8",
            "windows_per_step=8",
            "rotation=none",
            "rounding.algorithm=nearest",
        ),
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    pretrained = load_pretrained(tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), folder / "float"))
    packed = pretrained.with_model(bj.quantize_model(pretrained.model, [("layers/", "W6A8")]))
    save_model(folder / "W6A8.safetensors", packed)
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 300, (8, 16)))
    return folder


def run(case: str, inputs: Path, workdir: Path, *flags: str) -> dict:
    """The result.json of a program that sees eight devices."""
    config, fields = PROGRAMS[case]
    command = [sys.executable, "-m", f"experiments.{case.split()[0]}", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{field.format(inputs=inputs)}" for field in fields]
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={DEVICES}"])}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((workdir / RESULT_NAME).read_text())


@pytest.mark.covered("test_processes.py and the tests below; cut models, by models/sharding")
@pytest.mark.parametrize("case", PROGRAMS)
def test_eight_devices_give_what_one_does(case, inputs, tmp_path):
    """Texts and choices are the same; losses differ by the rounding of float sums."""
    one = run(case, inputs, tmp_path / "one")
    found = run(case, inputs, tmp_path / "mesh", "--config.mesh.data=4", "--config.mesh.model=2")
    if case == "allocate":
        for block, losses in one["losses"].items():
            for option, row in losses.items():
                np.testing.assert_allclose(found["losses"][block][option], row, rtol=1e-3)
        for budget in ("W2A8", "W5A8"):
            assert found["assignments"][budget]["choices"] == one["assignments"][budget]["choices"]
            assert found["assignments"][budget]["cost"] == one["assignments"][budget]["cost"]
    elif case == "dropped_planes":
        assert list(found["rows"]) == list(one["rows"])
        for name, row in one["rows"].items():
            np.testing.assert_allclose(found["rows"][name]["window_losses"], row["window_losses"], rtol=1e-4)
    else:
        assert (found["texts"], found["tokens"]) == (one["texts"], one["tokens"])
        assert (tmp_path / "mesh" / "text.txt").read_bytes() == (tmp_path / "one" / "text.txt").read_bytes()


@pytest.mark.parametrize(
    ("packed", "mesh", "texts", "found"),
    [
        (False, (1, 2), 4, ({"data": 2, "model": 1}, {})),
        (True, (1, 2), 3, ({"data": 1, "model": 2}, {"cut_tokens": True})),
        (True, (2, 1), 4, ({"data": 2, "model": 1}, {"cut_tokens": True})),
        (False, None, 3, (None, {"cut_tokens": True})),
    ],
)
def test_devices_divide_the_texts_of_a_float_model_whatever_their_axis(monkeypatch, packed, mesh, texts, found):
    """A float model is not cut: along `model` devices divide texts, too. A packed one gets the mesh as it is."""
    monkeypatch.setattr(meshes, "on_mesh", lambda _, mesh, cuts: (mesh and dict(mesh.shape), cuts))
    monkeypatch.setattr(meshes, "_is_packed", lambda _: packed)
    mesh = mesh and jax.make_mesh(mesh, ("data", "model"))
    assert writer_on_mesh(Mock(), mesh, {"cut_tokens": True}, texts) == found


@pytest.mark.parametrize(("packed", "mesh"), [(False, (1, 2)), (True, (2, 1))])
def test_texts_that_do_not_divide_are_refused(monkeypatch, packed, mesh):
    monkeypatch.setattr(meshes, "_is_packed", lambda _: packed)
    with pytest.raises(ValueError, match="config.batch_size=3 texts do not divide over 2 devices .*, such as 4"):
        writer_on_mesh(Mock(), jax.make_mesh(mesh, ("data", "model")), {}, 3)

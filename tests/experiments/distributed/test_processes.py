"""Flags of meshes and of processes, what they refuse, and what a launcher says of a process that JAX has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from ml_collections import ConfigDict

from configs import generate
from experiments.distributed import launcher, mesh
from experiments.distributed.mesh import cuts_of, mesh_of, on_mesh
from experiments.distributed.processes import Processes, has_lost_peers
from experiments.support.config_files import load_config
from experiments.training.placement import Placement

ROOT = Path(__file__).resolve().parents[3]
# A config of each program that has a mesh.
PROGRAMS = ("calibrate", "compare_training", "distill", "evaluate", "generate", "sample_text", "smollm2", "tiny_w2a2")
PROGRAMS += ("bench/llm", "compression/allocate", "compression/compare_methods", "compression/dropped_planes")


def mesh_config(data: int, model: int) -> ConfigDict:
    return ConfigDict({"mesh": {"data": data, "model": model}})


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_on_one_device_unless_a_mesh_is_asked_for(name):
    config = load_config(name).config
    assert mesh_of(config) is None
    config.mesh.data, config.mesh.model = 1, 2
    assert mesh_of(config).size == 2


def test_a_mesh_takes_as_many_devices_as_it_asks_for():
    assert mesh_of(ConfigDict()) is None
    assert dict(mesh_of(mesh_config(1, 2)).shape) == {"data": 1, "model": 2}
    with pytest.raises(
        ValueError, match=r"data=3 times config.mesh.model=2 is 6 devices, and there are 2: ask for few"
    ):
        mesh_of(mesh_config(3, 2))
    with pytest.raises(ValueError, match=r"config.mesh.model=0: both must be at least 1"):
        mesh_of(mesh_config(1, 0))


def test_configs_say_what_devices_cut(monkeypatch):
    config, asked = generate.get_config(), {}
    assert cuts_of(config) == {"cut_positions": False, "cut_tokens": True}
    assert cuts_of(mesh_config(1, 2)) == {}
    config.mesh.cut_positions, config.mesh.cut_tokens = True, False
    with pytest.raises(ValueError, match="is one device, which has all positions: leave out config.mesh.cut_positions"):
        mesh_of(config)
    config.mesh.model = 2
    monkeypatch.setattr(mesh, "shard_model", lambda *_, **options: asked.update(options) or Mock())
    on_mesh(Mock(), mesh_of(config), cuts_of(config))
    assert asked == {"layout": None, "cut_positions": True, "cut_tokens": False}


def test_batches_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr("experiments.training.placement.plan_training", lambda stages, sizes: None)
    with pytest.raises(ValueError, match="batch_size=5 does not divide over config.mesh.data=2 devices: .* such as 6"):
        Placement.of(mesh_of(mesh_config(2, 1)), [], 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here", 2, 0), "--coordinator=here has no host and port"),
        (("here:1234", 2, 2), "--process=2 of --processes=2: processes are numbered from 0 to 1"),
    ],
)
def test_processes_that_contradict_themselves_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Processes(*arguments)


def test_lost_peers_are_told_from_other_errors():
    assert has_lost_peers(ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1671"))
    assert has_lost_peers(RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote error"))
    assert not has_lost_peers(ValueError("the text is empty"))


def test_the_launcher_says_how_a_process_ended_that_could_not(monkeypatch, capfd):
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-S", "-c", "import os; os.abort()"])
    assert launcher.launch(Processes("here:1234", 2, 1)) == 1
    assert capfd.readouterr().err.strip().splitlines()[-1] == (
        "error: process 1 of 2 ended by SIGABRT: JAX lost the coordinator here:1234 or a peer; start all processes "
        "again with the same commands; training resumes from its last checkpoint"
    )
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-S", "-c", "raise SystemExit(3)"])
    assert launcher.launch(Processes("here:1234", 2, 1)) == 3


@pytest.mark.covered("the tests above; training on meshes, by models/sharding")
@pytest.mark.parametrize("count", [2, 4])
def test_runs_survive_the_death_of_a_process(count, tmp_path):
    """Minutes: five runs in real processes."""
    command = [sys.executable, "-m", "tests.experiments.distributed.processes_that_die", f"--processes={count}"]
    command += [f"--data={count // 2}", f"--folder={tmp_path}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    runs = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert [run["run"] for run in runs] == [
        "whole",
        "a worker is killed",
        "process 0 is killed",
        "a worker hangs",
        "resumed",
    ]

"""The wheel: typed, versioned, with the programs as commands, and nothing at the top level but the package."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import bipolar_jax
from tests.support.imports import ROOT

pytest.importorskip("hatchling", reason="builds the wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of the commands of an environment in which the wheel is installed beside this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    install = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file serves packages, but its own .pth files, such as an editable install's, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_nothing_but_the_package_is_at_the_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bipolar_jax", f"bipolar_jax-{bipolar_jax.__version__}.dist-info"}
    assert "bipolar_jax/py.typed" in names
    assert not [name for name in names if name.endswith((".pyc", ".png")) or "/results/" in name]


def test_the_wheel_has_every_program_and_config_of_the_checkout(wheel):
    """Except benchmarks: a new file has to be named in pyproject.toml."""
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [*ROOT.glob("configs/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/[dest]*/*.py")]
    assert {f"bipolar_jax/{file.relative_to(ROOT).as_posix()}" for file in files} <= names


@pytest.mark.parametrize("command", ["quantize", "calibrate", "generate", "train"])
@pytest.mark.sample(1)
def test_commands_run_with_shipped_configs(installed, tmp_path, command):
    config = {"quantize": "smollm2", "calibrate": "calibrate", "generate": "generate", "train": "tiny_w2a2"}[command]
    helped = run(installed / f"bipolar-{command}", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert f"usage: bipolar-{command} --config=CONFIG" in helped.stdout
    assert f"{config}.py and their defaults" in helped.stdout
    path = f"site-packages/bipolar_jax/configs/{config}.py"
    assert path in helped.stdout


def test_a_misspelt_field_of_a_shipped_config_is_refused(installed, tmp_path):
    refused = run(installed / "bipolar-generate", "--config=generate", "--config.tepm=1", cwd=tmp_path)
    assert refused.returncode == 1
    assert "site-packages/bipolar_jax/configs/generate.py has no field 'tepm'" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_version_is_that_of_the_package(installed, tmp_path):
    code = "import bipolar_jax, importlib.metadata as m; print(bipolar_jax.__version__, m.version('bipolar_jax'))"
    printed = run(installed / "python", "-c", code, cwd=tmp_path)
    assert printed.stdout.split() == [bipolar_jax.__version__] * 2, printed.stderr


def test_optax_and_absl_are_core_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = " ".join(project["dependencies"])
    assert "optax" in names
    assert "absl-py" in names

"""The programs of `experiments` as commands: bipolar-quantize, -calibrate, -allocate, -distill, -evaluate and so on.

A wheel has the programs inside the package; in a checkout they lie beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys


def quantize() -> None:
    """Runs `experiments.quantize`."""
    _run("quantize")


def calibrate() -> None:
    """Runs `experiments.calibrate`."""
    _run("calibrate")


def allocate() -> None:
    """Runs `experiments.allocate`."""
    _run("allocate")


def distill() -> None:
    """Runs `experiments.distill`."""
    _run("distill")


def evaluate() -> None:
    """Runs `experiments.evaluate`."""
    _run("evaluate")


def generate() -> None:
    """Runs `experiments.generate`."""
    _run("generate")


def train() -> None:
    """Runs `experiments.train`."""
    _run("train")


def _run(program: str) -> None:
    inside = f"{__package__}.experiments"
    package = inside if importlib.util.find_spec(inside) else "experiments"
    try:
        module = importlib.import_module(f"{package}.{program}")
    except ModuleNotFoundError as error:
        extra = "train" if program in ("train", "distill") else "experiments"
        sys.exit(f"error: {error}: pip install 'bipolar_jax[{extra}]'")
    module.command()

"""Benchmark configs that run in seconds, and the results of their runs."""

from __future__ import annotations

import json

from experiments.support.workdir import RESULT_NAME

PNG_SIGNATURE = b"\x89PNG"


def tiny(config, **fields):
    """The config with two iterations and compile threads, and the given fields."""
    config.iterations, config.compile_threads = 2, 2
    for name, value in fields.items():
        config[name] = value
    return config


def result_of(folder):
    """The contents of a run's result.json."""
    return json.loads((folder / RESULT_NAME).read_text())

"""The training configs, shrunk for tests, and readers of the files that a run writes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import tiny_w2a2
from experiments.support.workdir import RESULT_NAME
from experiments.training.log import read_metrics
from experiments.training.loop import TrainingRun

STEPS = 16


@contextlib.contextmanager
def compiled_once(folder):
    """Within, JAX keeps compiled programs in the folder: runs of the same config would compile them again."""
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in names.items():
            environment.setenv(name.upper(), str(value))  # inherited by programs that tests start
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def write_text(folder):
    """A text of a few thousand tokens that is easy to predict."""
    path = Path(folder, "text.txt")
    chapters = (f"It was the best of times, it was the worst of times; chapter {i} begins.\n" for i in range(500))
    path.write_text("".join(chapters))
    return path


def shrink(config, text):
    """Reduces a config, in place, to a model and a run of seconds; returns it."""
    config.text, config.vocab_size, config.window_length, config.validation_every = str(text), 280, 16, 3
    config.validation_text = ""
    if not config.pretrained:
        config.model.update({"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16})
        config.model.ffn_size = 48
    config.steps, config.batch_size, config.optimizer.warmup_steps = STEPS, 4, 2
    config.optimizer.learning_rate = 1e-2
    config.log_every, config.evaluate_every, config.evaluate_windows, config.evaluate_batch = 3, 8, 4, 4
    config.checkpoint_every, config.sample_tokens = 5, 0
    return config


def whole_config(text):
    """The config of most tests: quantized, in bfloat16."""
    config = shrink(tiny_w2a2.get_config(), text)
    config.quantization.learned_steps = False
    return config


def without_evaluation(monkeypatch):
    """Replaces evaluations by a constant score, in tests that do not look at it: they take long to compile."""
    score = {"loss": 0.0, "perplexity": 1.0, "standard_error": None, "windows": 1}
    monkeypatch.setattr(TrainingRun, "score", lambda self, model: dict(score))


def result_of(folder):
    return json.loads((folder / RESULT_NAME).read_text())


def losses(folder):
    """The logged metrics, but for the speed: they must not depend on where a run was stopped."""
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in read_metrics(folder)]

"""Trains a language model at any precision, from random or pretrained weights.

    python -m experiments.train --config=configs/tiny_w2a2.py --workdir=DIR

Writes to --workdir result.json, metrics.jsonl (one line per step), loss.png, tensorboard/,
checkpoints/, and the packed model model.safetensors, which experiments/generate.py reads. A
stopped run resumes from its last checkpoint and has the same losses as an uninterrupted one. Ctrl-C ends a run after
the step that it is in, with a checkpoint; a second one at once. With --config.mesh.data=2 --config.mesh.model=2 four
devices train; of several processes, started with --coordinator, --processes and --process, the first writes the files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.models.checkpoint import save_model
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import encode
from bipolar_jax.models.transformer import Transformer

from .distributed.mesh import mesh_of
from .distributed.processes import is_first
from .support import app
from .support.progress import console, progress_bar
from .support.sources import load_model_source, model_fingerprint
from .support.workdir import RESULT_NAME, environment, read_result, write_json
from .training.data import TrainingData, load_training_data
from .training.interrupt import Interrupt
from .training.log import plot_losses, read_metrics
from .training.loop import TrainingRun
from .training.model import Student, float_params, shapes_of

MODEL_NAME = "model.safetensors"
# Settings that do not affect the losses: a run may be resumed with other values.
_NOT_COMPARED = (
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "asynchronous",
    "evaluate_batch",
)
# The losses on another mesh differ by the rounding of float32 sums.
_NOT_COMPARED += ("prompt", "sample_tokens", "mesh")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    _check(config)
    with Interrupt().watching() as interrupt:
        _train(config, workdir, interrupt)


def _train(config: ConfigDict, workdir: Path, interrupt: Interrupt) -> None:
    mesh = mesh_of(config)
    workdir.mkdir(parents=True, exist_ok=True)
    pretrained = load_model_source(config.pretrained) if config.pretrained else None
    data = load_training_data(config, workdir, pretrained)
    student = Student.of(config, shapes_of(config, pretrained, data.tokenizer.get_vocab_size()))
    settings = _settings(config, data)
    result = read_result(workdir, settings, {"evaluations": ["step", "loss"]}) or {"settings": settings}
    result |= {"environment": environment(), "data": _data_facts(data)}
    teacher = _teacher(config, student, data, pretrained)
    params = float_params(pretrained.model, config.pretrained) if pretrained else student.initial(config.seed)
    run = TrainingRun(config, workdir, student, data, params, teacher, result, interrupt, mesh)
    run.train()
    _finish(run, config, workdir, data)


def _check(config: ConfigDict) -> None:
    """Raises ValueError if a count is below 1 or a weight outside 0..1."""
    for name in ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if config.distillation.teacher and not 0 <= config.distillation.weight <= 1:
        raise ValueError(f"distillation.weight must be from 0 to 1, got {config.distillation.weight}")


def _settings(config: ConfigDict, data: TrainingData) -> dict[str, Any]:
    """All that the losses depend on, in the form that JSON returns (lists for tuples)."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
    for name in ("pretrained", "teacher"):
        source = config.pretrained if name == "pretrained" else config.distillation.teacher
        settings[f"{name}_fingerprint"] = model_fingerprint(source) if source else None
    settings["data_sha256"] = data.fingerprint
    settings["tokenizer_sha256"] = hashlib.sha256(data.tokenizer.to_str().encode()).hexdigest()
    return json.loads(json.dumps(settings))


def _data_facts(data: TrainingData) -> dict[str, int]:
    return {
        "vocab_size": data.tokenizer.get_vocab_size(),
        "train_tokens": data.train.size,
        "validation_tokens": data.validation.size,
    }


def _teacher(
    config: ConfigDict, student: Student, data: TrainingData, pretrained: PretrainedModel | None
) -> Transformer | None:
    """The float teacher in the student's dtype; None if the config names none.

    Raises:
      ValueError: teacher and student have different vocabularies.
    """
    name = config.distillation.teacher
    if not name:
        return None
    loaded = pretrained if name == config.pretrained else load_model_source(name)
    sizes = loaded.model.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1] or loaded.tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise ValueError(
            f"the teacher {name} has another vocabulary ({sizes[0]} tokens) than the student ({sizes[1]}): "
            "distillation compares their logits, so give both the same tokenizer"
        )
    float_student = Student(loaded.model.config, student.dtype, (), {})
    stage, params = float_student.stage(0, float_params(loaded.model, name))
    return stage.model(params)


def pack(model: Transformer) -> Transformer:
    """The model with every layer packed that was trained at low precision; a float model is returned as it is."""
    kinds = (bj.DotGeneral, bj.nn.StatefulDotGeneral)
    trained = any(isinstance(getattr(layer, "dot_general", None), kinds) for _, layer in nnx.iter_modules(model))
    return bj.quantize_model(model) if trained else model


def _finish(run: TrainingRun, config: ConfigDict, workdir: Path, data: TrainingData) -> None:
    """Packs, saves and evaluates the trained model, and writes the result."""
    result, model = run.result, run.local_model()
    if not is_first():
        return
    with progress_bar(f"packing and writing {MODEL_NAME}"):
        packed = jax.block_until_ready(pack(model))
        save_model(workdir / MODEL_NAME, PretrainedModel(packed, data.tokenizer), f"{config.name}, step {run.step}")
    size = (workdir / MODEL_NAME).stat().st_size
    result["packed"] = run.score(packed) | {"checkpoint": MODEL_NAME, "checkpoint_bytes": size}
    if config.sample_tokens:
        with progress_bar("generating a sample"):
            (tokens,) = generate(packed, [encode(data.tokenizer, config.prompt)], config.sample_tokens)
        result |= {"prompt": config.prompt, "sample": data.tokenizer.decode(tokens)}
    if run.tokens_per_second is not None:
        result["tokens_per_second"] = run.tokens_per_second
    write_json(workdir / RESULT_NAME, result)
    plot_losses(read_metrics(workdir), result["evaluations"], config.name, workdir / "loss.png")
    perplexity = result["packed"]["perplexity"]
    console.print(f"packed: perplexity {'inf' if perplexity is None else f'{perplexity:.5g}'}, {size / 1e6:.1f} MB")
    if config.sample_tokens:
        console.print(result["prompt"] + result["sample"], markup=False, style="dim")
    console.print(f"results and the model: {workdir}")


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="tiny_w2a2", several_processes=True)


if __name__ == "__main__":
    command()

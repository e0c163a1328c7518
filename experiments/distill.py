"""Distils a calibrated model from its float self: what it lost in rounding it learns back, in part.

    python -m experiments.distill --config=configs/distill.py --workdir=DIR \\
        --config.packed=CALIBRATED/W4A8g64.safetensors --config.text=PATH

The packed model's token probabilities learn from the float model's, on text that the float model writes. Writes to
--workdir result.json and perplexity.png as experiments/calibrate does, with the losses, and the packed model, which
experiments/generate.py reads. A stopped run resumes with the same losses; Ctrl-C ends one after the step that it is in.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.compress.distillation import learning_model, packed_again
from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.transformer import Transformer

from .support import app
from .support.precision_sweep import LAYERS, Sweep, measure
from .support.progress import progress_bar
from .support.sources import model_fingerprint
from .support.workdir import RESULT_NAME, write_json
from .training.distillation_run import DistillationRun, schedule_of
from .training.interrupt import Interrupt

WINDOWS_NAME = "distillation_windows.npy"
# Settings that the losses and the perplexity depend on.
_LEARNING = ("steps", "learning_rate", "warmup_steps", "scale_rate", "clip_norm", "batch_size", "seed", "dtype")
_SETTINGS = ("model", "packed", "rotation_seed", "learn_groups", "text", "windows", "window_length", *_LEARNING)
_DISTILLATION = ("distillation_text", "distillation_windows", "distillation_length")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    schedule_of(config)  # refuses impossible ones before anything is loaded
    if not config.packed:
        raise ValueError("config.packed is missing: give the checkpoint of a calibrated model")
    with Interrupt().watching() as interrupt:
        _distil(config, workdir, interrupt)


def _distil(config: ConfigDict, workdir: Path, interrupt: Interrupt) -> None:
    with progress_bar(f"loading {Path(config.packed).name}"):
        packed = load_pretrained(config.packed).model
    fingerprint = hashlib.sha256(Path(config.packed).read_bytes()).hexdigest()
    fields = (*_SETTINGS, *_DISTILLATION)
    sweep = Sweep.begin(config, workdir, fields, packed_sha256=fingerprint, text_fingerprint=_text_fingerprint(config))
    floats, precision = sweep.pretrained.model, _precision(packed)
    sweep.measure_baseline()
    if "calibrated" not in sweep.result:
        sweep.result["calibrated"] = measure(
            "calibrated", sweep.pretrained.with_model(packed), sweep.loaded.ids, config
        )
        write_json(workdir / RESULT_NAME, sweep.result)

    def distil(_: bj.Precision) -> nnx.Module:
        dtype = jnp.dtype(config.dtype or ("bfloat16" if default_device().platform == "gpu" else "float32"))
        teacher = prepare_for_inference(floats, dtype)
        windows = _windows(config, workdir, teacher)
        learning = learning_model(
            packed,
            in_basis_of(packed, floats, config.rotation_seed),
            learn_groups=config.learn_groups,
            dtype=dtype,
        )
        run = DistillationRun(config, workdir, sweep.result["settings"], learning, teacher, windows)
        run.train(interrupt)
        sweep.result["distillation"] = run.log
        return packed_again(run.model(), packed)

    sweep.add(precision, distil)
    sweep.show(f"distilled from {Path(config.packed).name}")


def in_basis_of(packed: Transformer, floats: Transformer, seed: int) -> Transformer:
    """The float model, rotated as experiments/calibrate rotated it before it made the packed one.

    Raises:
      ValueError: another seed, or a rotation that calibrate does not make.
    """
    wanted = packed.config.rotation
    if wanted is None:
        return floats
    block = None if wanted.ffn is None else wanted.ffn.block
    for kind in ("full", "foldable"):
        rotated = bj.compress.rotate(floats, kind, key=jax.random.key(seed), block=block)
        if rotated.config.rotation == wanted:
            return rotated
    raise ValueError(
        f"the packed model was rotated otherwise than by rotation_seed={seed}: give the seed of its calibration"
    )


def _precision(packed: Transformer) -> bj.Precision:
    """The precision that names the result: of the first packed layer of the blocks.

    Raises:
      ValueError: no packed layers in the blocks.
    """
    for _, layer in nnx.iter_modules(packed.layers):
        if isinstance(layer, bj.nn.Linear):
            return layer.precision
    raise ValueError(f"the model of config.packed has no packed layers that match {LAYERS!r}: calibrate it first")


def _windows(config: ConfigDict, workdir: Path, teacher: Transformer) -> Int[np.ndarray, "windows length"]:
    """Text to learn from; what the teacher writes is kept in the workdir, because writing takes long.

    Raises:
      ValueError: a file of other shapes, or of no token ids of the model.
    """
    count, length = config.distillation_windows, config.distillation_length
    if config.distillation_text != "self":
        windows = np.load(config.distillation_text)
        if windows.ndim != 2 or len(windows) < count or windows.shape[1] < length:
            raise ValueError(
                f"{config.distillation_text} has the shape {windows.shape}, asked for are {count} windows of {length}"
            )
        windows = windows[:count, :length]
        teacher.check_ids(windows)
        return windows.astype(np.int32)
    path = workdir / WINDOWS_NAME
    if path.is_file():
        return np.load(path)
    key, step = jax.random.key(config.seed), config.windows_per_step
    with progress_bar("the float model writes", count) as advance:
        windows = bj.models.write_windows(
            teacher, count, length, key=key, windows_per_step=step, on_window=lambda done: advance(int(done))
        )
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, windows)
    return windows


def _text_fingerprint(config: ConfigDict) -> Any:
    """A digest of a file of windows; None where the teacher writes."""
    return None if config.distillation_text == "self" else model_fingerprint(config.distillation_text)


def command() -> None:
    """The command line."""
    app.run(main, example="distill")


if __name__ == "__main__":
    command()

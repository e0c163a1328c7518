"""Distils calibrated models from their float self: what they lost in rounding they learn back, in part.

    python -m experiments.distill --config=configs/distill.py --workdir=DIR --config.text=PATH \\
        --config.packed=CALIBRATED/W4A8g64.safetensors,CALIBRATED/W3A8g64.safetensors

Each packed model's token probabilities learn from the float model's, on text that the float model writes. All share
this text, the float model and its score; their programs compile while the text is written. Steps and learning rates are
those of each precision (`compress.distillation.Schedule.of`), unless the config has others; --config.seconds makes them
fewer where time is short, --config.steps_factor=4 four times as many. Writes to --workdir result.json and
perplexity.png as experiments/calibrate does, with losses and seconds, and the packed models, which
experiments/generate.py reads. With --config.mesh.data=2 two devices divide the windows of an update. A stopped run
resumes with the same losses, on GPUs up to rounding; Ctrl-C ends one after the step that it is in.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import dataclasses
import hashlib
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.compress.distillation import Schedule, Step, Student, learning_model, packed_again
from bipolar_jax.format import as_format
from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.inference.perplexity import Perplexity
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.transformer import Transformer

from .support import app
from .support.precision_sweep import LAYERS, MADE, Sweep, measure, scored_windows
from .support.progress import console, progress_bar
from .support.sources import model_fingerprint
from .support.workdir import RESULT_NAME, differences, write_json
from .training.distillation_run import DistillationRun, check, fitted, schedule_of, seconds_of_step
from .training.interrupt import Interrupt

WINDOWS_NAME = "distillation_windows.npy"
CALIBRATED, DISTILLATION = "calibrated", "distillation"
# Settings that losses and perplexities depend on, and those of a single packed model.
_LEARNING = ("warmup_steps", "scale_rate", "clip_norm", "batch_size", "seed", "dtype", "learn_groups_up_to")
_SETTINGS = ("model", "rotation_seed", "text", "windows", "window_length", *_LEARNING)
_DISTILLATION = ("distillation_text", "distillation_windows", "distillation_length")
# What preparing, packing and scoring take on a GPU, programs compiled; --config.seconds has it, too.
_SECONDS_OF_SCORE = 10.0


@dataclasses.dataclass(frozen=True)
class Pupil:
    """A packed model that is to learn.

    Attributes:
      path: of its checkpoint.
      model: as it was calibrated.
      precision: of its first packed layer, which names it.
      schedule: that it would have without a limit of time.
      settings: what its result depends on, JSON.
    """

    path: Path
    model: Transformer
    precision: bj.Precision
    schedule: Schedule
    settings: dict[str, Any]

    @classmethod
    def load(cls, path: Path, config: ConfigDict) -> Pupil:
        """Reads a checkpoint. Raises ValueError for one without packed layers, or an impossible schedule."""
        model = load_pretrained(path).model
        precision = _precision(model, path)
        schedule = schedule_of(config, precision)
        settings = {"packed": str(path), "packed_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        settings |= {"steps": schedule.steps, "learning_rate": schedule.learning_rate}
        return cls(path, model, precision, schedule, settings)

    @property
    def name(self) -> str:
        """The precision."""
        return str(self.precision)


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    started = time.perf_counter()
    check(config)
    paths = [Path(name) for name in app.split_names(config.packed)]
    if not paths:
        raise ValueError("config.packed is missing: give checkpoints of calibrated models, comma separated")
    with Interrupt().watching() as interrupt:
        with progress_bar(f"loading {', '.join(path.name for path in paths)}"):
            pupils = [Pupil.load(path, config) for path in paths]
        names = [pupil.name for pupil in pupils]
        if len(set(names)) < len(names):
            raise ValueError(f"config.packed has {', '.join(names)}: give one checkpoint of each precision")
        _Distillation(config, workdir, pupils, interrupt, started).run()


class _Distillation:
    """One run of the program.

    Attributes:
      config, workdir, pupils, interrupt: see `main`.
      deadline: when it is to have ended, on `time.perf_counter`; infinity without a limit.
      sweep: the float model and the results.
      teacher: the float model as it writes and teaches.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, pupils: Sequence[Pupil], interrupt: Interrupt, started: float
    ):
        self.config, self.workdir, self.pupils, self.interrupt = config, workdir, pupils, interrupt
        self.deadline = started + config.seconds if config.seconds else float("inf")
        text = None if config.distillation_text == "self" else model_fingerprint(config.distillation_text)
        sections = (MADE, CALIBRATED)
        self.sweep = Sweep.begin(config, workdir, (*_SETTINGS, *_DISTILLATION), sections, text_fingerprint=text)
        self._stored = self.sweep.result.setdefault(DISTILLATION, {})
        for pupil in pupils:
            stored = self._stored.get(pupil.name)
            if stored is not None and (other := differences(stored["settings"], pupil.settings)):
                raise ValueError(
                    f"{workdir / RESULT_NAME} has {pupil.name} with other settings ({other}): choose another --workdir"
                )
        self.teacher = prepare_for_inference(self.sweep.pretrained.model, dtype_of(config))
        # Precisions of one calibration share the rotated model.
        self._floats: list[Transformer] = []
        self._one_at_a_time = threading.Lock()
        self._seconds = {"load": time.perf_counter() - started}

    def run(self) -> None:
        """Distils all that are not done."""
        waiting = [pupil for pupil in self.pupils if not self.sweep.is_done(pupil.precision)]
        self._timed("rotate", lambda: [self._in_basis_of(pupil.model) for pupil in waiting])
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(2 * len(waiting) or 1) as pool:
            submit = lambda function, pupil: pool.submit(contextvars.copy_context().run, function, pupil)  # noqa: E731
            scored = [submit(self._scored, pupil) for pupil in waiting]
            prepared = [submit(self._compile, pupil) for pupil in waiting]
            self._timed("baseline", self.sweep.measure_baseline)
            windows = self._timed("write_text", lambda: _windows(self.config, self.workdir, self.teacher))
            with progress_bar("compiling"):
                concurrent.futures.wait([*scored, *prepared])
        for pupil, score, compiled in zip(waiting, scored, prepared, strict=True):
            compiled.result()
            packed = self.sweep.pretrained.with_model(pupil.model)
            row = measure(f"{pupil.name} calibrated", packed, self.sweep.loaded.ids, self.config, scored=score.result())
            self.sweep.result[CALIBRATED][pupil.name] = row
        self._seconds["write_text_and_compile"] = time.perf_counter() - started
        self._write()
        while waiting:
            self._distil(waiting, windows)
            del waiting[0]
        self.sweep.show("distilled")
        self._print_table()

    def _scored(self, pupil: Pupil) -> Perplexity:
        """Of a model before it learns."""
        return scored_windows(None, pupil.model, self.sweep.loaded.ids, self.config)

    def _compile(self, pupil: Pupil) -> None:
        """Compiles what the pupil will need; its numbers take memory only while no other's do."""
        with self._one_at_a_time:
            learning = self._learning(pupil)
            packed_again(learning, pupil.model)
            learning = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), learning)
        self._step(learning).compile(self.config.batch_size, self.config.distillation_length)

    def _in_basis_of(self, packed: Transformer) -> Transformer:
        """The float model in the basis of a packed one."""
        for floats in self._floats:
            if floats.config.rotation == packed.config.rotation:
                return floats
        self._floats.append(in_basis_of(packed, self.sweep.pretrained.model, self.config.rotation_seed))
        return self._floats[-1]

    def _learning(self, pupil: Pupil) -> Transformer:
        """The pupil as it learns."""
        learn_groups = as_format(pupil.precision.w_bits).bits <= self.config.learn_groups_up_to
        floats = self._in_basis_of(pupil.model)
        return learning_model(pupil.model, floats, learn_groups=learn_groups, dtype=dtype_of(self.config))

    def _step(self, learning: Transformer) -> Step:
        return Step(Student(learning), self.teacher, parts=self.config.parts, mesh=self.sweep.mesh)

    def _distil(self, waiting: Sequence[Pupil], windows: Int[np.ndarray, "windows length"]) -> None:
        """The first of those that wait."""
        pupil, config = waiting[0], self.config
        folder = self.workdir / f"{pupil.name}.training"

        def distil(_: bj.Precision) -> nnx.Module:
            started = time.perf_counter()
            step = self._step(self._learning(pupil))
            schedule, seconds = self._schedule(waiting, step, windows)
            row, prepared = self._stored[pupil.name], time.perf_counter()
            settings = {**self.sweep.result["settings"], **pupil.settings, "fitted_steps": schedule.steps}
            run = DistillationRun(config, folder, settings, step, schedule, windows)
            run.train(self.interrupt)
            row["log"], row["seconds"] = run.log, {"prepare": round(prepared - started, 1)}
            row["seconds"]["train"] = round(time.perf_counter() - prepared, 1)
            row["milliseconds"] = round(run.milliseconds or 1e3 * seconds, 1)
            return packed_again(run.model(), pupil.model)

        self.sweep.add(pupil.precision, distil)
        shutil.rmtree(folder, ignore_errors=True)

    def _schedule(self, waiting: Sequence[Pupil], step: Step, windows) -> tuple[Schedule, float]:
        """That of the first of those that wait, which share the time that is left by their steps; seconds of a step."""
        pupil, config = waiting[0], self.config
        stored = self._stored.get(pupil.name)
        if stored is not None:
            return Schedule(**stored["schedule"]), stored["seconds_of_step"]
        seconds, schedule = seconds_of_step(step, windows, config.batch_size), pupil.schedule
        if config.seconds:
            left = self.deadline - time.perf_counter() - _SECONDS_OF_SCORE * len(waiting)
            share = left * schedule.steps / sum(each.schedule.steps for each in waiting)
            schedule = fitted(schedule, seconds, share)
            console.print(
                f"{pupil.name}: {schedule.steps} of {pupil.schedule.steps} steps, {1e3 * seconds:.1f} ms each, fit its "
                f"{share:.0f} of the {left:.0f} seconds left"
            )
        self._stored[pupil.name] = {
            "settings": pupil.settings,
            "schedule": dataclasses.asdict(schedule),
            "seconds_of_step": round(seconds, 5),
        }
        self._write()
        return schedule, seconds

    def _timed(self, name: str, function: Any) -> Any:
        started = time.perf_counter()
        result = function()
        self._seconds[name] = time.perf_counter() - started
        return result

    def _write(self) -> None:
        self.sweep.result["seconds"] = {name: round(seconds, 1) for name, seconds in self._seconds.items()}
        write_json(self.workdir / RESULT_NAME, self.sweep.result)

    def _print_table(self) -> None:
        result = self.sweep.result
        float_one = result["baseline"]["perplexity"]
        table = Table(title=f"perplexity, float {float_one:.5g}")
        for heading in ("precision", "calibrated", "distilled", "steps", "rate", "ms a step", "train", "all seconds"):
            table.add_column(heading, justify="left" if heading == "precision" else "right")
        for pupil in self.pupils:
            row, about, before = (result[section][pupil.name] for section in (MADE, DISTILLATION, CALIBRATED))
            schedule, seconds = about["schedule"], row["seconds"]
            table.add_row(
                pupil.name,
                *("inf" if each["perplexity"] is None else f"{each['perplexity']:.5g}" for each in (before, row)),
                str(schedule["steps"]),
                f"{schedule['learning_rate']:g}",
                f"{about['milliseconds']:g}",
                f"{about['seconds']['train']:.0f} s",
                f"{seconds['quantize'] + seconds['evaluate'] + seconds['sample']:.0f}",
            )
        console.print(table)
        console.print(", ".join(f"{part} {seconds:.0f} s" for part, seconds in self._seconds.items()))


def dtype_of(config: ConfigDict) -> jnp.dtype:
    """Of the operands of products."""
    return jnp.dtype(config.dtype or ("bfloat16" if default_device().platform == "gpu" else "float32"))


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


def _precision(packed: Transformer, path: Path) -> bj.Precision:
    """The precision that names the result: of the first packed layer of the blocks.

    Raises:
      ValueError: no packed layers in the blocks.
    """
    for _, layer in nnx.iter_modules(packed.layers):
        if isinstance(layer, bj.nn.Linear):
            return layer.precision
    raise ValueError(f"{path} has no packed layers that match {LAYERS!r}: calibrate it first")


def _windows(config: ConfigDict, workdir: Path, teacher: Transformer) -> Int[np.ndarray, "windows length"]:
    """Text to learn from; what the teacher writes is kept in the workdir, because writing takes long.

    Raises:
      ValueError: a file of other shapes, or of no token ids of the model.
    """
    count, length = config.distillation_windows, config.distillation_length
    path = workdir / WINDOWS_NAME
    given = path if config.distillation_text == "self" else Path(config.distillation_text)
    if given != path or path.is_file():
        windows = np.load(given)
        if windows.ndim != 2 or len(windows) < count or windows.shape[1] < length:
            raise ValueError(f"{given} has the shape {windows.shape}, asked for are {count} windows of {length}")
        windows = windows[:count, :length]
        teacher.check_ids(windows)
        return windows.astype(np.int32)
    key, step = jax.random.key(config.seed), config.windows_per_step
    with progress_bar("the float model writes", count) as advance:
        windows = bj.models.write_windows(
            teacher, count, length, key=key, windows_per_step=step, on_window=lambda done: advance(int(done))
        )
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, windows)
    return windows


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="distill")


if __name__ == "__main__":
    command()

"""The loop of distillation: batches of windows, updates, the log of losses, checkpoints; and steps that fit a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.compress.distillation import DistillationState, Schedule, Step

from ..support.progress import console, progress_bar
from .checkpoint import TrainingCheckpoints
from .interrupt import Interrupt

_TIMED_STEPS = 5


def schedule_of(config: ConfigDict, precision: bj.Precision) -> Schedule:
    """The rates of a precision: the config's, or where these are 0 its own (`Schedule.of`); a tenth of steps warm up.

    Its own steps are multiplied by `steps_factor`, over which the learning rate then decays.

    Raises:
      ValueError: as `Schedule`.
    """
    asked = {"steps": config.steps, "learning_rate": config.learning_rate}
    changes = {name: value for name, value in asked.items() if value}
    schedule = Schedule.of(precision, **changes, warmup=0, scale_rate=config.scale_rate, clip_norm=config.clip_norm)
    steps = config.steps or max(1, round(config.steps_factor * schedule.steps))
    return dataclasses.replace(schedule, steps=steps, warmup=min(config.warmup_steps, steps // 10))


def check(config: ConfigDict) -> None:
    """Raises ValueError for counts that cannot be."""
    for name in ("batch_size", "parts", "log_every", "checkpoint_every"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if jax.process_count() > 1:
        raise ValueError(f"one process distils, on its devices, and there are {jax.process_count()}: start one")
    devices = config.mesh.data * config.mesh.model
    if config.batch_size % (config.parts * devices):
        raise ValueError(
            f"parts={config.parts} times the {devices} devices of config.mesh must divide "
            f"batch_size={config.batch_size}"
        )
    if config.distillation_windows < config.batch_size:
        raise ValueError(
            f"a batch takes {config.batch_size} windows, there are {config.distillation_windows}: write more"
        )
    if not 0 < config.steps_factor < math.inf:
        raise ValueError(f"steps_factor must be positive and finite, got {config.steps_factor}")
    if config.steps and config.steps_factor != 1:
        raise ValueError(
            f"steps_factor={config.steps_factor} multiplies the steps of each precision, steps={config.steps} replaces "
            "them: give one of the two"
        )
    if config.seconds < 0:
        raise ValueError(f"seconds must be at least 0, which is no limit, got {config.seconds}")


def seconds_of_step(step: Step, windows: Int[np.ndarray, "windows length"], size: int) -> float:
    """Of an update, measured with a copy of the student; the first call compiles, unless that is done."""
    schedule, state = Schedule(_TIMED_STEPS + 1, 1e-6, warmup=0), DistillationState.of(step.student.params)
    for done in range(_TIMED_STEPS + 1):
        state, metrics = step(state, windows[:size], schedule, done)
        if done == 0:
            jax.block_until_ready(metrics)
            started = time.perf_counter()
    jax.block_until_ready(metrics)
    return (time.perf_counter() - started) / _TIMED_STEPS


def fitted(schedule: Schedule, seconds_of_step: float, seconds: float) -> Schedule:
    """The schedule with as many of its steps as the time allows, of which at most a tenth warm up.

    Raises:
      RuntimeError: there is not time for one.
    """
    steps = min(schedule.steps, int(seconds / seconds_of_step))
    if steps < 1:
        raise RuntimeError(
            f"{max(seconds, 0):.1f} seconds are left, a step takes {seconds_of_step:.3g}: give more --config.seconds, "
            "or fewer checkpoints at once"
        )
    if steps == schedule.steps:
        return schedule
    return dataclasses.replace(schedule, steps=steps, warmup=min(schedule.warmup, steps // 10))


def batch_of(
    windows: Int[np.ndarray, "windows length"], step: int, size: int, seed: int
) -> Int[np.ndarray, "size length"]:
    """The batch of a step: windows in an order that is drawn anew for every pass over them; the rest is left out."""
    per_pass = len(windows) // size
    passes, index = divmod(step, per_pass)
    order = np.random.default_rng([seed, passes]).permutation(len(windows))
    return windows[order[index * size : (index + 1) * size]]


class DistillationRun:
    """A run, from its start or its last checkpoint to its last step.

    Attributes:
      done: number of updates made.
      state: what learns, and the optimizer's state.
      log: rows with "step", "loss" and "gradient_norm", means over `log_every` updates; and the rate.
      milliseconds: of an update in this process, of those that were logged after the first time; None before.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        settings: dict[str, Any],
        step: Step,
        schedule: Schedule,
        windows: Int[np.ndarray, "windows length"],
    ):
        """Starts from a student, or resumes from the last checkpoint in the folder.

        Args:
          config: the fields of configs/distill.py.
          folder: of checkpoints.
          settings: that the losses depend on; a checkpoint of others is refused.
          step: with the student and the teacher.
          schedule: the rates.
          windows: text that the teacher wrote.

        Raises:
          ValueError: a checkpoint that is damaged or belongs to another run.
        """
        self._config, self._windows, self._step, self._schedule = config, windows, step, schedule
        self.done, self.log, self._timed = 0, [], []
        self.state = DistillationState.of(step.student.params)
        self._checkpoints = TrainingCheckpoints(folder, settings, keep=1, asynchronous=False)
        if steps := self._checkpoints.steps():
            with progress_bar(f"reading the checkpoint of step {steps[-1]}"):
                restored = self._checkpoints.restore(self.state, steps[-1])
            self.done, self.state, self.log = restored.step, restored.state, restored.data["log"]
            console.print(f"resuming after step {self.done}")

    @property
    def milliseconds(self) -> float | None:
        """See the class."""
        timed = self._timed[1:] or self._timed
        return 1e3 * sum(seconds for _, seconds in timed) / sum(count for count, _ in timed) if timed else None

    def train(self, interrupt: Interrupt) -> None:
        """Runs all remaining steps.

        Raises:
          RuntimeError: a loss or gradient is not finite.
          KeyboardInterrupt: SIGINT arrived; a checkpoint of the last step is written.
        """
        pending: list[dict[str, jax.Array]] = []
        config, steps = self._config, self._schedule.steps
        try:
            with interrupt.deferred(), progress_bar("distilling", steps) as advance:
                started = time.perf_counter()
                while self.done < steps:
                    batch = batch_of(self._windows, self.done, config.batch_size, config.seed)
                    self.state, metrics = self._step(self.state, batch, self._schedule, self.done)
                    self.done += 1
                    pending.append(metrics)
                    # What the last step leaves is packed and scored at once, which takes no longer than a checkpoint.
                    is_last = self.done == steps
                    saves = not is_last and (self.done % config.checkpoint_every == 0 or interrupt.requested)
                    if self.done % config.log_every == 0 or saves or is_last:
                        self._flush(pending, started, advance)
                        started = time.perf_counter()
                    if saves:
                        self._checkpoints.save(self.done, self.state, {"log": self.log})
                        started = time.perf_counter()
                    if interrupt.requested and not is_last:
                        raise KeyboardInterrupt(f"interrupted after step {self.done}: the same command resumes there")
        finally:
            self._checkpoints.close()

    def model(self) -> nnx.Module:
        """The learning model with the current numbers."""
        return self._step.student.model(jax.device_get(self.state.params))

    def _flush(self, pending: list[dict[str, jax.Array]], started: float, advance: Callable[..., None]) -> None:
        """Fetches and checks the metrics of the steps since the last call, and adds their means to the log."""
        fetched = jax.device_get(pending)
        self._timed.append((len(fetched), time.perf_counter() - started))
        for step, metrics in enumerate(fetched, self.done - len(fetched) + 1):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise RuntimeError(
                        f"the {name.replace('_', ' ')} of step {step} is {value}: lower learning_rate, and use another "
                        "--workdir"
                    )
        row = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}
        self.log.append({"step": self.done, **row, "learning_rate": self._schedule.rate(self.done - 1)})
        count, seconds = self._timed[-1]
        advance(self.done, f"loss {row['loss']:.4f}, {1e3 * seconds / count:.1f} ms a step")
        pending.clear()

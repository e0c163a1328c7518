"""The loop of distillation: batches of windows, updates, the log of losses, checkpoints."""

from __future__ import annotations

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

from bipolar_jax.compress.distillation import DistillationState, Schedule, Student, make_step

from ..support.progress import console, progress_bar
from .checkpoint import TrainingCheckpoints
from .interrupt import Interrupt


def schedule_of(config: ConfigDict) -> Schedule:
    """The rates that a config asks for. Raises ValueError as `Schedule`."""
    return Schedule(config.steps, config.learning_rate, config.warmup_steps, config.scale_rate, config.clip_norm)


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
      step: number of updates made.
      state: what learns, and the optimizer's state.
      log: rows with "step", "loss" and "gradient_norm", means over `log_every` updates; and the rate.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        settings: dict[str, Any],
        model: nnx.Module,
        teacher: nnx.Module,
        windows: Int[np.ndarray, "windows length"],
    ):
        """Starts from a learning model, or resumes from the last checkpoint in the workdir.

        Args:
          config: the fields of configs/distill.py.
          workdir: folder of the run.
          settings: that the losses depend on; a checkpoint of others is refused.
          model: see `learning_model`.
          teacher: the float model.
          windows: text that the teacher wrote.

        Raises:
          ValueError: a checkpoint that is damaged or belongs to another run; fewer windows than a batch; counts below
            1.
        """
        for name in ("batch_size", "parts", "log_every", "checkpoint_every"):
            if config[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {config[name]}")
        if config.batch_size % config.parts:
            raise ValueError(f"parts={config.parts} must divide batch_size={config.batch_size}")
        if len(windows) < config.batch_size:
            raise ValueError(f"a batch takes {config.batch_size} windows, there are {len(windows)}: write more")
        self._config, self._windows = config, windows
        self._student, self._schedule = Student(model), schedule_of(config)
        self._update = make_step(self._student, teacher, self._schedule, parts=config.parts)
        self.step, self.log = 0, []
        self.state = DistillationState.initial(self._student, self._schedule)
        self._checkpoints = TrainingCheckpoints(workdir, settings, keep=1, asynchronous=False)
        if steps := self._checkpoints.steps():
            with progress_bar(f"reading the checkpoint of step {steps[-1]}"):
                restored = self._checkpoints.restore(self.state, steps[-1])
            self.step, self.state, self.log = restored.step, restored.state, restored.data["log"]
            console.print(f"resuming after step {self.step}")

    def train(self, interrupt: Interrupt) -> None:
        """Runs all remaining steps.

        Raises:
          RuntimeError: a loss or gradient is not finite.
          KeyboardInterrupt: SIGINT arrived; a checkpoint of the last step is written.
        """
        pending: list[dict[str, jax.Array]] = []
        config, last_saved = self._config, self.step
        try:
            with interrupt.deferred(), progress_bar("distilling", config.steps) as advance:
                started = time.perf_counter()
                while self.step < config.steps:
                    batch = batch_of(self._windows, self.step, config.batch_size, config.seed)
                    self.state, metrics = self._update(self.state, batch)
                    self.step += 1
                    pending.append(metrics)
                    ends = self.step == config.steps or interrupt.requested
                    saves = self.step % config.checkpoint_every == 0 or ends
                    if self.step % config.log_every == 0 or saves:
                        self._flush(pending, time.perf_counter() - started, advance)
                        started = time.perf_counter()
                    if saves and last_saved != self.step:
                        self._checkpoints.save(self.step, self.state, {"log": self.log})
                        last_saved, started = self.step, time.perf_counter()
                    if interrupt.requested and self.step < config.steps:
                        raise KeyboardInterrupt(f"interrupted after step {self.step}: the same command resumes there")
        finally:
            self._checkpoints.close()

    def model(self) -> nnx.Module:
        """The learning model with the current numbers."""
        return self._student.model(self.state.params)

    def _flush(self, pending: list[dict[str, jax.Array]], seconds: float, advance: Callable[..., None]) -> None:
        """Fetches and checks the metrics of the steps since the last call, and adds their means to the log."""
        if not pending:
            return
        fetched = jax.device_get(pending)
        for step, metrics in enumerate(fetched, self.step - len(fetched) + 1):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise RuntimeError(
                        f"the {name.replace('_', ' ')} of step {step} is {value}: lower learning_rate, and use another "
                        "--workdir"
                    )
        row = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}
        rate = len(fetched) / seconds
        self.log.append({"step": self.step, **row, "learning_rate": float(self._schedule.rate(self.step - 1))})
        advance(self.step, f"loss {row['loss']:.4f}, {rate:.2f} steps/s")
        pending.clear()

"""The training loop: updates, metrics, evaluations, checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.transformer import Transformer

from ..distributed.processes import any_process
from ..support.progress import console, progress_bar
from ..support.workdir import RESULT_NAME, write_json
from .checkpoint import TrainingCheckpoints
from .data import TrainingData
from .interrupt import Interrupt
from .log import TrainingLog, perplexity_of
from .model import Params, Student, without_step_sizes
from .placement import Placement
from .step import make_optimizer, make_schedule, make_step


class TrainingRun:
    """A training run, from its start or last checkpoint to its last step.

    Attributes:
      step: number of updates made.
      state: parameters, optimizer state and PRNG key.
      result: the contents of result.json; the run appends to `evaluations`.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        student: Student,
        data: TrainingData,
        params: Params,
        teacher: Transformer | None,
        result: dict[str, Any],
        interrupt: Interrupt,
        mesh: Mesh | None = None,
    ):
        """Starts from `params`, or resumes from the last checkpoint in the workdir.

        Args:
          config: the fields of configs/tiny_base.py.
          workdir: folder of the run.
          student: the model and its precisions.
          data: windows for training and validation.
          params: initial parameters, float32.
          teacher: float model to distill from, or None.
          result: contents of result.json so far, with "settings".
          interrupt: ends `train` between steps.
          mesh: of all devices, in all processes; None trains on one device.

        Raises:
          ValueError: a checkpoint that is damaged or belongs to another run; a config that
            contradicts itself or does not fit the data or the mesh.
        """
        self.result, self._config, self._workdir = result, config, workdir
        self._student, self._data, self._interrupt = student, data, interrupt
        self._optimizer, self._schedule = make_optimizer(config), make_schedule(config)
        self._batches = data.batches(config.batch_size, config.seed)
        stages = [student.stage(step, params) for step in (student.changes if mesh is not None else (0,))]
        self._placement = Placement.of(mesh, stages, config.batch_size)
        self._teacher = teacher if teacher is None else self._placement.teacher(teacher)
        _, params = stages[0]
        self.step, self.state = 0, self._placement.state(params, self._optimizer, config.seed)
        self._saved = 0
        self._checkpoints = TrainingCheckpoints(
            workdir, result["settings"], config.keep_checkpoints, config.asynchronous
        )
        if last := self._checkpoints.last():
            with progress_bar(f"reading the checkpoint of step {last}"):
                restored = self._checkpoints.restore(self.state, last)
            self.step, self.state = restored.step, self._placement.restored(restored.state)
            self._saved = last
            self._batches.set_state(restored.data)
            console.print(f"resuming after step {self.step}")
        result["parameters"] = sum(value.size for value in params.values())
        # A run without a checkpoint starts over, and evaluates step 0 again.
        last = self.step or -1
        result["evaluations"] = [row for row in result.get("evaluations", []) if row["step"] <= last]
        self._log = TrainingLog(workdir, self.step)
        self._pending: list[dict[str, jax.Array]] = []
        self._rates: list[float] = []

    def train(self) -> None:
        """Runs all remaining steps.

        Raises:
          RuntimeError: a loss or gradient is not finite.
          KeyboardInterrupt: SIGINT arrived; a checkpoint of the last step is written.
        """
        config = self._config
        try:
            with self._interrupt.deferred(), progress_bar("training", config.steps) as advance:
                self._begin_stage()
                if self.step == 0:
                    self._evaluate()
                    self._clock = time.perf_counter()
                while self.step < config.steps:
                    self._stop_if_interrupted(advance)
                    if self.step in self._student.changes[1:]:
                        self._flush(advance)
                        self._begin_stage()
                    batch = self._placement.batch(next(self._batches))
                    self.state, metrics = self._update(self.state, batch, self._teacher)
                    self.step += 1
                    self._pending.append(metrics)
                    self._after_update(advance)
                self._stop_if_interrupted(advance)
        finally:
            try:
                self._checkpoints.close()
            finally:
                self._log.close()

    def model(self) -> Transformer:
        """The model with the current parameters, where they are."""
        return self._stage.model(self.state.params)

    def local_model(self) -> Transformer:
        """The same on one device of this process; all processes call this."""
        return self._stage.model(self._placement.one_device(self.state.params))

    def score(self, model: Transformer) -> dict[str, Any]:
        """Loss (nats per token) and perplexity on the validation windows."""
        windows = self._data.validation[: self._config.evaluate_windows or None]
        scored = perplexity(
            model,
            windows.reshape(-1),
            windows=len(windows),
            window_length=windows.shape[1],
            windows_per_step=self._config.evaluate_batch,
        )
        finite = math.isfinite(scored.perplexity)  # JSON has neither NaN nor Inf
        return {
            "loss": math.log(scored.perplexity) if finite else None,
            "perplexity": scored.perplexity if finite else None,
            "standard_error": scored.standard_error if math.isfinite(scored.standard_error) else None,
            "windows": scored.windows,
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the intervals between metrics, without the first, which includes compilation."""
        return round(statistics.median(self._rates[1:]), 1) if len(self._rates) > 1 else None

    def _begin_stage(self) -> None:
        """Builds the model and update function of the next step's precision; the parameters stay."""
        step = min(self.step, self._config.steps - 1)
        self._stage, _ = self._student.stage(step, without_step_sizes(self.state.params))
        shardings = self._placement.shardings(self.state)
        self._update = make_step(self._stage, self._optimizer, self._config.distillation, shardings)
        self._clock = time.perf_counter()

    def _after_update(self, advance: Callable[..., None]) -> None:
        """Writes metrics, evaluates and saves a checkpoint if this step is due for them."""
        config, last = self._config, self.step == self._config.steps
        evaluates = last or self.step % config.evaluate_every == 0
        saves = last or self.step % config.checkpoint_every == 0
        if evaluates or saves or self.step % config.log_every == 0:
            self._flush(advance)
        if evaluates:
            self._evaluate()
        if saves:  # _flush has checked that all metrics up to here are finite
            self._save()
        if evaluates or saves:
            self._clock = time.perf_counter()

    def _stop_if_interrupted(self, advance: Callable[..., None]) -> None:
        """Writes a checkpoint of this step and raises KeyboardInterrupt, if SIGINT has arrived."""
        if self._pending and jax.process_count() > 1:
            return  # several processes agree to stop where they exchange metrics
        if not any_process(self._interrupt.requested):
            return
        self._flush(advance)
        if self.step > self._saved:
            self._save()
        raise KeyboardInterrupt(f"interrupted after step {self.step}: the same command resumes there")

    def _save(self) -> None:
        self._checkpoints.save(self.step, self.state, self._batches.get_state())
        self._saved = self.step

    def _flush(self, advance: Callable[..., None]) -> None:
        """Fetches, checks and writes the metrics of the steps since the last call."""
        fetched = jax.device_get(self._pending)
        if not fetched:
            return
        seconds, first = time.perf_counter() - self._clock, self.step - len(fetched) + 1
        rate = len(fetched) * self._config.batch_size * self._config.window_length / seconds
        rows = []
        for step, metrics in enumerate(fetched, first):
            row = {"step": step} | {name: float(value) for name, value in metrics.items()}
            for name, value in row.items():
                if not math.isfinite(value):
                    self._log.write(rows)
                    raise RuntimeError(self._not_finite(step, name, value))
            row["perplexity"] = perplexity_of(row["cross_entropy"])
            row["learning_rate"] = float(self._schedule(step - 1))
            rows.append(row | {"tokens_per_second": round(rate, 1)})
        self._log.write(rows)
        self._rates.append(rate)
        self._pending, self._clock = [], time.perf_counter()
        perplexity_now = rows[-1]["perplexity"] or math.inf
        advance(self.step, f"loss {rows[-1]['loss']:.4f}, perplexity {perplexity_now:.5g}, {rate:,.0f} tokens/s")

    def _not_finite(self, step: int, name: str, value: float) -> str:
        steps = self._checkpoints.steps()
        remedy = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
        return (
            f"the {name.replace('_', ' ')} of step {step} is {value}: training stopped, {remedy}; lower "
            "optimizer.learning_rate or optimizer.clip_norm, and use another --workdir"
        )

    def _evaluate(self) -> None:
        """Scores the current parameters, and once the teacher, on the validation windows; writes the result."""
        row = {"step": self.step} | self.score(self.model())
        self.result["evaluations"].append(row)
        self._log.write([row], "validation")
        if self._teacher is not None and "teacher" not in self.result:
            self.result["teacher"] = self.score(self._teacher)
        write_json(self._workdir / RESULT_NAME, self.result)
        console.print(f"step {self.step}: validation perplexity {row['perplexity'] or math.inf:.5g}")

"""The loop over training steps: metrics, evaluations and checkpoints in their turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.transformer import Transformer
from experiments.support.progress import console, progress_bar
from experiments.support.workdir import RESULT_NAME, write_json
from experiments.training.checkpoint import TrainingCheckpoints
from experiments.training.data import TrainingData
from experiments.training.log import TrainingLog, perplexity_of
from experiments.training.model import Params, Student, without_step_sizes
from experiments.training.step import as_batch, initial_state, make_optimizer, make_schedule, make_step


class TrainingRun:
    """A run, from where it stands to its last step.

    Attributes:
      step: updates made so far.
      state: parameters, optimizer and key.
      result: what becomes result.json; `evaluations` grows here.
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
    ):
        """Begins, or goes on after the last checkpoint in the workdir.

        Raises:
          ValueError: a checkpoint that is damaged or another run's; a config that does not
            fit itself or the data.
        """
        self.result, self._config, self._workdir = result, config, workdir
        self._student, self._data, self._teacher = student, data, teacher
        self._optimizer, self._schedule = make_optimizer(config), make_schedule(config)
        self._batches = data.batches(config.batch_size, config.seed)
        _, params = student.stage(0, params)
        self.step, self.state = 0, initial_state(params, self._optimizer, config.seed)
        self._checkpoints = TrainingCheckpoints(
            workdir, result["settings"], config.keep_checkpoints, config.asynchronous
        )
        if steps := self._checkpoints.steps():
            with progress_bar(f"reading the checkpoint of step {steps[-1]}"):
                restored = self._checkpoints.restore(self.state, steps[-1])
            self.step, self.state = restored.step, restored.state
            self._batches.set_state(restored.data)
            console.print(f"goes on after step {self.step}")
        result["parameters"] = sum(value.size for value in params.values())
        # One that starts anew, since it was stopped before its first checkpoint, evaluates the beginning again.
        last = self.step if self.step else -1
        result["evaluations"] = [row for row in result.get("evaluations", []) if row["step"] <= last]
        self._log = TrainingLog(workdir, self.step)
        self._pending: list[dict[str, jax.Array]] = []
        self._rates: list[float] = []

    def train(self) -> None:
        """Takes all steps that are left.

        Raises:
          RuntimeError: a loss or gradient that is not finite.
        """
        config = self._config
        try:
            with progress_bar("training", config.steps) as advance:
                self._begin_stage()
                if self.step == 0:
                    self._evaluate()
                    self._clock = time.perf_counter()
                while self.step < config.steps:
                    if self.step in self._student.changes[1:]:
                        self._flush(advance)
                        self._begin_stage()
                    batch = as_batch(next(self._batches))
                    self.state, metrics = self._update(self.state, batch, self._teacher)
                    self.step += 1
                    self._pending.append(metrics)
                    self._look(advance)
        finally:
            self._checkpoints.close()
            self._log.close()

    def model(self) -> Transformer:
        """The model of the last step that was taken."""
        return self._stage.model(self.state.params)

    def score(self, model: Transformer) -> dict[str, Any]:
        """Loss and perplexity of a model on the validation windows."""
        windows = self._data.validation[: self._config.evaluate_windows or None]
        found = perplexity(
            model,
            windows.reshape(-1),
            windows=len(windows),
            window_length=windows.shape[1],
            windows_per_step=self._config.evaluate_batch,
        )
        finite = math.isfinite(found.perplexity)  # JSON has no other numbers
        return {
            "loss": math.log(found.perplexity) if finite else None,
            "perplexity": found.perplexity if finite else None,
            "standard_error": found.standard_error if math.isfinite(found.standard_error) else None,
            "windows": found.windows,
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the times that metrics were fetched, without the first, which compiled."""
        return round(statistics.median(self._rates[1:]), 1) if len(self._rates) > 1 else None

    def _begin_stage(self) -> None:
        """The model of the coming step, and its compiled update; the parameters are those there are."""
        step = min(self.step, self._config.steps - 1)
        self._stage, _ = self._student.stage(step, without_step_sizes(self.state.params))
        self._update = make_step(self._stage, self._optimizer, self._config.distillation)
        self._clock = time.perf_counter()

    def _look(self, advance: Callable[..., None]) -> None:
        """Metrics, evaluation and checkpoint, where it is time for them."""
        config, last = self._config, self.step == self._config.steps
        evaluates = last or self.step % config.evaluate_every == 0
        saves = last or self.step % config.checkpoint_every == 0
        if evaluates or saves or self.step % config.log_every == 0:
            self._flush(advance)
        if evaluates:
            self._evaluate()
        if saves:  # all steps so far were found finite
            self._checkpoints.save(self.step, self.state, self._batches.get_state())
        if evaluates or saves:
            self._clock = time.perf_counter()

    def _flush(self, advance: Callable[..., None]) -> None:
        """Fetches and writes the metrics of the steps since the last time."""
        found = jax.device_get(self._pending)
        if not found:
            return
        seconds, first = time.perf_counter() - self._clock, self.step - len(found) + 1
        rate = len(found) * self._config.batch_size * self._config.window_length / seconds
        rows = []
        for step, metrics in enumerate(found, first):
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
        kept = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        return (
            f"the {name.replace('_', ' ')} of step {step} is {value}: training stopped, {kept}; lower "
            "optimizer.learning_rate or optimizer.clip_norm, in another --workdir"
        )

    def _evaluate(self) -> None:
        """Perplexity on the validation windows, of the parameters as they are."""
        row = {"step": self.step} | self.score(self.model())
        self.result["evaluations"].append(row)
        self._log.write([row], "validation")
        if self._teacher is not None and "teacher" not in self.result:
            self.result["teacher"] = self.score(self._teacher)
        write_json(self._workdir / RESULT_NAME, self.result)
        console.print(f"step {self.step}: validation perplexity {row['perplexity'] or math.inf:.5g}")

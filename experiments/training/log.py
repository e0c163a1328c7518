"""The log of a training run: metrics.jsonl, TensorBoard events, the loss plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from tensorboardX import SummaryWriter

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.checkpoint.json_text import parse_json

from ..distributed.processes import is_first
from ..support.plotting import save
from ..support.workdir import check_rows

METRICS_NAME = "metrics.jsonl"


class TrainingLog:
    """One line of JSON per training step, and the same numbers as TensorBoard events.

    A run that resumes at step n drops the lines of later steps, so that every step appears once. Of several processes
    the first writes.
    """

    def __init__(self, workdir: Path, step: int):
        """Opens the files to append steps after `step`."""
        self._file = None
        if not is_first():
            return
        self._path = workdir / METRICS_NAME
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        with atomic_write(self._path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a")
        # TensorBoard ignores events of older files from purge_step on.
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, rows: Sequence[dict[str, Any]], prefix: str = "train") -> None:
        """Appends rows, each with a "step"; rows with the prefix "train" also become lines of metrics.jsonl."""
        if self._file is None:
            return
        for row in rows:
            if prefix == "train":
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(f"{prefix}/{name}", value, row["step"])
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Complete rows of metrics.jsonl; a killed process may leave its last line incomplete.

    Raises:
      ValueError: a row has no step or no cross entropy.
    """
    path, rows = workdir / METRICS_NAME, []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(parse_json(line))
        except ValueError:
            break
    check_rows(path, "lines", rows, ["step", "cross_entropy"])
    return rows


def perplexity_of(loss: float) -> float | None:
    """exp(loss), for a loss in nats per token; None where it is too large for JSON."""
    return math.exp(loss) if loss < 700 else None


def plot_losses(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plots the cross entropy of training and validation over steps."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["cross_entropy"] for row in rows], linewidth=0.7, label="training")
    axes.plot([row["step"] for row in evaluations], [row["loss"] for row in evaluations], "o-", label="validation")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)", title=title)
    axes.legend()
    save(figure, path)

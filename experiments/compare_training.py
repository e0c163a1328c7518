"""Compares the validation losses of several runs of experiments/train.py on the same data with one baseline run.

    python -m experiments.compare_training --config=configs/compare_training.py --workdir=DIR

Over many epochs of a small text the float baseline overfits sooner than a low-bit model. Losses are therefore compared
with both the baseline's final loss and its least. Writes result.json and losses.png to --workdir. No model runs here:
the runs may have trained on any mesh, and config.mesh, which all programs take, changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
from ml_collections import ConfigDict
from rich.table import Table

from .distributed.mesh import mesh_of
from .support import app
from .support.plotting import colour, save
from .support.progress import console
from .support.workdir import RESULT_NAME, check_rows, read_json, write_json

# Settings that must be equal for two losses to be comparable.
_SHARED = ("data_sha256", "steps", "batch_size", "window_length", "evaluate_windows")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    if mesh_of(config) is not None:
        console.print("no model runs here: results are read on the host, whatever config.mesh is", style="dim")
    results = [_read(Path(folder.strip())) for folder in config.runs.split(",")]
    runs = {result["settings"]["name"]: summary(result) for result in results}
    if config.baseline not in runs:
        raise ValueError(f"baseline {config.baseline} is not among the runs: choose one of {', '.join(runs)}")
    for result in results:
        for name in _SHARED:
            mine, other = result["settings"][name], results[0]["settings"][name]
            if mine != other:
                names = result["settings"]["name"], results[0]["settings"]["name"]
                raise ValueError(f"{names[0]} has {name}={mine}, {names[1]} has {other}: train both with the same")
    baseline = runs[config.baseline]
    for run in runs.values():
        run["above_final"] = round(run["final"] - baseline["final"], 4)
        run["above_least"] = round(run["final"] - baseline["least"], 4)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RESULT_NAME, {"baseline": config.baseline, "runs": runs})
    _plot(results, workdir / "losses.png")
    _print_table(runs, config.baseline)
    console.print(f"results and plot: {workdir}")


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The compared values of one run's result.json; losses in nats per token.

    Raises:
      ValueError: the run has not finished.
    """
    name, evaluations = result["settings"]["name"], result["evaluations"]
    if "packed" not in result:
        raise ValueError(
            f"the run {name} stopped at step {evaluations[-1]['step']}: run its command again to finish it"
        )
    least = min(evaluations, key=lambda row: row["loss"])
    return {
        "rules": result["settings"]["rules"],
        "seed": result["settings"]["seed"],
        "final": evaluations[-1]["loss"],
        "packed": result["packed"]["loss"],
        "least": least["loss"],
        "least_at_step": least["step"],
        "tokens_per_second": result.get("tokens_per_second"),
        "device": result["environment"]["device"],
    }


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}: name workdirs of experiments/train.py")
    result = read_json(path)
    if "evaluations" not in result:
        raise ValueError(f"{path} is the result of another experiment: name workdirs of experiments/train.py")
    check_rows(path, "evaluations", result["evaluations"], ["step", "loss"])
    check_rows(path, "settings", [result.get("settings")], ["rules", "seed", "name"])
    check_rows(path, "environment", [result.get("environment")], ["device"])
    return result


def _print_table(runs: dict[str, dict[str, Any]], baseline: str) -> None:
    table = Table(title=f"validation loss, nats per token; differences to {baseline}")
    for heading in ("run", "final", "packed", "above final", "above least", "own least", "at step"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, run in runs.items():
        numbers = [run[key] for key in ("final", "packed", "above_final", "above_least", "least")]
        table.add_row(name, *(f"{number:.4f}" for number in numbers), str(run["least_at_step"]))
    console.print(table)


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, result in enumerate(results):
        rows = [row for row in result["evaluations"] if row["step"]]  # step 0, rounded random weights, is off the scale
        axes.plot(
            [row["step"] for row in rows],
            [row["loss"] for row in rows],
            "o-",
            color=colour(2 * index),
            label=result["settings"]["name"],
        )
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


if __name__ == "__main__":
    app.run(main, example="compare_training")

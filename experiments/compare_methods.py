"""Compares methods of compression on the same draws of calibration text: means over draws, paired differences.

    python -m experiments.compare_methods --config=configs/compression/compare_methods.py --workdir=DIR \\
        --config.compared=rounding,gptq,descent --config.seeds=0,1,2 --config.precisions=W4A8g64 --config.text=PATH

Every method and draw is a run of experiments/calibrate in a folder of its own, so that a stopped comparison resumes
from the last block that was finished. Methods of one draw share its text; all runs share the float model, its score,
and compiled programs: further draws compile nothing, further precisions little. Methods with a "peer" are those of qwix
(experiments/evaluation/qwix_methods.py). Writes to --workdir result.json, with the seconds of each part, a table and
comparison.png: of each method the mean perplexity over draws, and how much more it loses than `config.against`, with
the standard errors of both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.extras import require
from bipolar_jax.models.inference.xla_flags import pin_float_products

from . import calibrate
from .support import app
from .support.paired_draws import NO_DRAW, mean_difference, mean_perplexity
from .support.plotting import save
from .support.precision_sweep import MADE, ROUNDED, Loaded
from .support.progress import console, progress_bar
from .support.workdir import RESULT_NAME, environment, read_json, write_json

ROUNDING = "rounding"
_OWN_FIELDS = ("seeds", "compared", "against", "methods")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    names = app.parse_names("compared", config.compared, [ROUNDING, *config.methods])
    seeds = app.split_names(config.seeds)
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"config.seeds is {config.seeds!r}: give whole numbers, such as 0,1,2")
    if config.against not in names:
        raise ValueError(f"config.against is {config.against!r}: choose from {', '.join(names)}")
    peers = {name for name in names if name != ROUNDING and "peer" in config.methods[name]}
    if ROUNDING in names and peers.issuperset(set(names) - {ROUNDING}):
        raise ValueError("config.compared has rounding without a calibration of ours: use experiments.quantize")
    if peers:
        require("qwix", "peers")
    workdir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    loaded = Loaded.of(config)
    seconds = {"load": time.perf_counter() - started, "write_texts": 0.0, "runs": 0.0}
    # Draws outside, so that a stopped comparison has whole draws.
    runs: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for seed in seeds:
        started = time.perf_counter()
        text = _draw(config, seed, workdir, loaded)
        seconds["write_texts"] += time.perf_counter() - started
        for name in (name for name in names if name != ROUNDING):
            console.print(f"draw {seed}, {name}")
            rounds_too = ROUNDING in names and name not in peers and not runs[ROUNDING]
            folder, started = workdir / f"{name}_{seed}", time.perf_counter()
            _run(_config_of(config, name, seed, text, with_rounding=rounds_too), folder, loaded)
            seconds["runs"] += time.perf_counter() - started
            found = read_json(folder / RESULT_NAME)
            runs[name][seed] = found
            if rounds_too:
                runs[ROUNDING][NO_DRAW] = found
            result = _gathered(config, runs) | {"seconds": {part: round(each, 1) for part, each in seconds.items()}}
            write_json(workdir / RESULT_NAME, result)
    _plot(result, workdir / "comparison.png")
    _print_table(result)
    parts = ", ".join(f"{part} {each:g} s" for part, each in result["seconds"].items())
    console.print(f"{parts}; results and plot: {workdir}")


def _run(config: ConfigDict, folder: Path, loaded: Loaded) -> None:
    """Calibrates by this package, or by the library that the method names."""
    if "peer" not in config:
        return calibrate.main(config, folder, loaded)
    from .evaluation import qwix_methods  # needs an optional package

    return qwix_methods.main(config, folder, loaded)


def _draw(config: ConfigDict, seed: str, workdir: Path, loaded: Loaded) -> str:
    """The calibration text of a draw: a file of windows that the model wrote, or, where a text is given, that text."""
    if config.calibration_text != "self":
        return config.calibration_text
    path = workdir / f"tokens_{seed}.npy"
    if not path.is_file():
        shape = config.calibration_windows, config.calibration_length
        model = loaded.pretrained.model
        with progress_bar(f"draw {seed}: the model writes its text", config.calibration_windows) as advance:
            tokens = calibrate.written_text(model, shape, int(seed), advance)
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, tokens)
    return str(path)


def _config_of(config: ConfigDict, name: str, seed: str, text: str, *, with_rounding: bool) -> ConfigDict:
    """The config of a run of experiments/calibrate."""
    run = config.copy_and_resolve_references()  # with sections of its own, which methods change
    run.unlock()  # a command line's has no fields to add or delete
    for field in _OWN_FIELDS:
        del run[field]
    changes = config.methods[name].to_dict()
    suffix = changes.pop("suffix", "")
    if "peer" in changes:
        run.peer, run.checkpoints = changes.pop("peer"), False
    run.update(changes)
    run.seed, run.calibration_text = int(seed), text
    run.precisions = ",".join(precision + suffix for precision in app.split_names(config.precisions))
    run.rounded = config.precisions if with_rounding else ""
    return run


def _gathered(config: ConfigDict, runs: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What result.json holds: figures of every draw, and the summary."""
    first = next(found for draws in runs.values() for found in draws.values())
    settings = {name: value for name, value in first["settings"].items() if name not in ("seed", "calibration_text")}
    result = {"settings": settings, "environment": environment(), "baseline": first["baseline"], "methods": {}}
    result["settings"] |= {"seeds": config.seeds, "against": config.against, "methods": config.methods.to_dict()}
    for name, draws in runs.items():
        section = ROUNDED if name == ROUNDING else MADE
        for seed, found in draws.items():
            for precision, row in found[section].items():
                plain = precision.removesuffix("f") if name != ROUNDING else precision
                kept = {field: row[field] for field in ("perplexity", "window_losses", "seconds", "bytes")}
                result["methods"].setdefault(name, {}).setdefault(plain, {})[seed] = kept
    result["summary"] = {
        precision: _summary(result["methods"], precision, config.against)
        for precision in app.split_names(config.precisions)
    }
    return result


def _summary(methods: dict[str, Any], precision: str, against: str) -> dict[str, Any]:
    """Means of one precision by method; differences only where the reference has draws already."""
    losses = {
        name: {seed: row["window_losses"] for seed, row in rows[precision].items()}
        for name, rows in methods.items()
        if precision in rows and all(row["perplexity"] is not None for row in rows[precision].values())
    }
    summary = {}
    for name, draws in losses.items():
        perplexity = mean_perplexity(draws)
        row = {
            "draws": len(draws) - (NO_DRAW in draws),
            "perplexity": perplexity.mean,
            "standard_error": perplexity.standard_error,
        }
        if name != against and (name == ROUNDING or set(draws) & set(losses.get(against, ()))) and against in losses:
            row["difference"] = mean_difference(draws, losses[against])._asdict()
        summary[name] = row
    return summary


def _relative(nats: float) -> str:
    return f"{math.expm1(nats):+.2%}"


def table_rows(result: dict[str, Any]) -> list[Sequence[str]]:
    """Rows of texts: precision, method, draws, perplexity, against float, difference."""
    rows = []
    for precision, methods in result["summary"].items():
        for name, row in methods.items():
            difference, error = row.get("difference"), row["standard_error"]
            apart = "-"
            if difference is not None:
                apart = _relative(difference["mean"])
                if difference["standard_error"] is not None:
                    apart += f" ({difference['standard_error']:.2%})"
            figure = f"{row['perplexity']:.5g}" + ("" if error is None else f" ({error:.2g})")
            growth = f"{row['perplexity'] / result['baseline']['perplexity'] - 1:+.2%}"
            rows.append((precision, name, str(row["draws"]), figure, growth, apart))
    return rows


def _print_table(result: dict[str, Any]) -> None:
    settings, baseline = result["settings"], result["baseline"]
    scored = f"{baseline['windows']} windows of {settings['text']}, float {baseline['perplexity']:.5g}"
    table = Table(title=f"{settings['model']}, {settings['calibration_windows']} windows a draw, {scored}")
    headings = ("precision", "method", "draws", "perplexity (std. error)", "against float")
    for heading in (*headings, f"against {settings['against']} (std. error)"):
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)


def _plot(result: dict[str, Any], path: Path) -> None:
    """Growth of the perplexity over the float model's, with the standard error over draws."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = list(result["methods"])
    for index, name in enumerate(names):
        points = [(at, row[name]) for at, row in enumerate(result["summary"].values()) if name in row]
        places = [at + 0.6 * (index + 0.5) / len(names) - 0.3 for at, _ in points]
        growth = [row["perplexity"] / result["baseline"]["perplexity"] - 1 for _, row in points]
        errors = [(row["standard_error"] or 0) / result["baseline"]["perplexity"] for _, row in points]
        axes.errorbar(places, growth, errors, fmt="o", capsize=3, label=name)
    axes.set_xticks(range(len(result["summary"])), list(result["summary"]))
    axes.set(ylabel="growth of the perplexity", yscale="log")
    axes.set_title(f"{result['settings']['model']} on {result['settings']['text']}")
    axes.legend(fontsize=8)
    save(figure, path)


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="compression/compare_methods")


if __name__ == "__main__":
    command()

"""Writes CALIBRATION.md, a page of what calibration reaches and takes, from results that programs have measured.

    python -m experiments.bench.calibration_page --config=configs/bench/calibration_page.py \\
        --workdir=experiments/results

Models that were scored on the same windows share a table, where a difference is that of their losses on the same
windows, with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bipolar_jax.checkpoint.atomic_write import atomic_write
from experiments.compare_methods import table_rows
from experiments.support import app
from experiments.support.paired_draws import NO_DRAW, mean_difference
from experiments.support.progress import console
from experiments.support.workdir import read_json

PAGE = "CALIBRATION.md"
_HEAD = """# What calibration reaches, and what it takes

Written by `python -m experiments.bench.calibration_page --config=configs/bench/calibration_page.py
--workdir=experiments/results`; its files name their commands in `environment`. Figures in parentheses are standard
errors. "Rounded" is to the nearest number of a grid with zero on it, without rotation or text. Seconds are those of the
run, which may have shared its machine; the README of each folder says so.
"""


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program; see the module docstring."""
    names = {field: app.split_names(config[field]) for field in ("models", "comparisons", "parts")}
    results = {field: {name: read_json(workdir / name) for name in files} for field, files in names.items()}
    lines = [_HEAD, *_models(results["models"]), *_comparisons(results["comparisons"]), *_parts(results["parts"])]
    with atomic_write(workdir / PAGE) as partial:
        partial.write_text("\n".join(lines).rstrip("\n") + "\n")
    console.print(f"{workdir / PAGE}: {sum(map(len, names.values()))} files")


def _models(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A table for each text, model and number of windows."""
    tables: dict[tuple, list[tuple[str, dict[str, Any]]]] = {}
    for name, result in results.items():
        settings = result["settings"]
        scored = (settings["model"], settings["text"], settings["windows"], settings["window_length"])
        tables.setdefault(scored, []).append((name, result))
    for (model, text, windows, length), files in tables.items():
        yield f"## {model}, {windows} windows of {length} tokens of {Path(text).name}\n"
        baseline = files[0][1]["baseline"]
        yield f"Float: {baseline['perplexity']:.5g} ({baseline['standard_error']:.2g}).\n"
        yield from _table(
            (
                "precision",
                "made by",
                "MB",
                "perplexity",
                "against float",
                "against rounded",
                "seconds",
                "peak GB",
                "file",
            ),
            _model_rows(files),
        )


def _model_rows(files: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Sequence[str]]:
    rows = [
        (precision, _method(result, section, precision), row, result["baseline"], name)
        for name, result in files
        for section in ("rounded", "calibrated", "precisions")
        for precision, row in result.get(section, {}).items()
        if row["perplexity"] is not None
    ]
    rounded = {precision: row for precision, method, row, *_ in rows if method == "rounding"}
    for precision, method, row, baseline, name in sorted(rows, key=lambda row: row[0]):
        apart = "-"
        if method != "rounding" and precision in rounded:
            losses = {NO_DRAW: row["window_losses"]}, {NO_DRAW: rounded[precision]["window_losses"]}
            difference = mean_difference(*losses)
            apart = f"{math.expm1(difference.mean):+.1%} ({difference.standard_error or 0:.1%})"
        growth = f"{row['perplexity'] / baseline['perplexity'] - 1:+.1%}"
        seconds, peak = row["seconds"].get("quantize"), row.get("peak_bytes")
        yield (
            precision,
            method,
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['perplexity']:.5g}",
            growth,
            apart,
            "-" if seconds is None else f"{seconds:.0f}",
            "-" if peak is None else f"{peak / 1e9:.1f}",
            f"[{Path(name).parent.name}]({name})",
        )


def _method(result: dict[str, Any], section: str, precision: str) -> str:
    settings = result["settings"]
    if "distillation" in result:
        steps, windows = result["distillation"][precision]["schedule"]["steps"], settings["distillation_windows"]
        return f"distilled, {steps} steps, {windows} windows" if section == "precisions" else "calibration before it"
    if section == "rounded" or "calibration_windows" not in settings:
        return "rounding"
    windows = f"{settings['calibration_windows']} windows"
    learned = ", blocks learn" if settings.get("reconstruction", {}).get("epochs", 0) > 0 else ""
    return f"{settings['rounding']['algorithm'].upper()}{learned}, rotation {settings['rotation']}, {windows}"


def _comparisons(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, result in results.items():
        settings = result["settings"]
        yield f"## Methods on the same draws of text: {settings['model']}\n"
        windows = f"{settings['calibration_windows']} windows a draw, seeds {settings['seeds']}"
        windows += f"; scales of the embedding by {settings['embedding_calibration'] or 'default'}"
        yield f"{windows}; scored on {settings['windows']} windows of {Path(settings['text']).name}; `{name}`.\n"
        headings = ("precision", "method", "draws", "perplexity", "against float", f"against {settings['against']}")
        yield from _table(headings, table_rows(result))


def _parts(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, result in results.items():
        settings = result["settings"]
        windows = f"{settings['windows']} windows of {settings['length']}"
        device = result["environment"]["device"]
        yield f"## Seconds: {settings['model']}, {settings['precision']}, {windows}, {device}\n"
        yield f"The first call compiles; stages of rounding are cumulative. `{name}`\n"
        rows = (
            (part, _text(row.get("seconds")), _text(row["first"]), _text(row["compile_seconds"]), str(row["peak_gb"]))
            for part, row in result["parts"].items()
        )
        yield from _table(("part", "seconds", "first call", "of it compilation", "peak GB"), rows)


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def _table(headings: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, the first two columns to the left."""
    yield f"| {' | '.join(headings)} |"
    yield f"| {' | '.join('---' if index < 2 else '---:' for index, _ in enumerate(headings))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    app.run(main)

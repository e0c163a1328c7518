"""Plots of the matmul experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from experiments.support.figures import bars, colour, legend, save


def plot_speedup(result: dict[str, Any], path: Path) -> None:
    """Maps of the speed-up over bf16 by shape and precision: kernel alone, and whole operation."""
    shapes = {name: row for name, row in result["shapes"].items() if row["precisions"]}
    names = list(dict.fromkeys(name for row in shapes.values() for name in row["precisions"]))
    parts = {"kernel": "kernel alone", "operation": "whole operation, activations quantized on the way"}
    size = (0.5 * len(names) + 4, 2 * (0.3 * len(shapes) + 1.6))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    for axes, (part, title) in zip(figure.subplots(2, 1, sharex=True), parts.items(), strict=True):
        _map(axes, names, {shape: _speedups(row, part) for shape, row in shapes.items()})
        axes.set_title(title)
    figure.suptitle(f"times as fast as XLA's bf16 product, {result['settings']['device']}")
    save(figure, path)


def plot_roofline(result: dict[str, Any], path: Path) -> None:
    """Operations a second against operations a byte, with the ceilings of the three units and of memory."""
    ceilings = result["settings"]["ceilings"]
    figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for shape, row in result["shapes"].items():
        for measured in row["precisions"].values():
            kernel = measured.get("kernel")
            if kernel:
                point = (kernel["operations_per_byte"], kernel["operations_per_second"])
                points.setdefault((shape, measured["kind"]), []).append(point)
    colours = {shape: colour(index) for index, shape in enumerate(result["shapes"])}
    for (shape, kind), some in points.items():
        label = f"{shape}, {'binary' if kind == 'planes' else kind}"
        axes.plot(*zip(*some, strict=True), "o" if kind == "planes" else "s", color=colours[shape], label=label)
    everywhere = [x for some in points.values() for x, _ in some] or [1.0]
    span = np.geomspace(min(everywhere) / 4, max(everywhere) * 4, 200)
    for unit in ("binary", "int8", "bf16"):
        axes.plot(span, np.minimum(ceilings[unit], ceilings["bandwidth"] * span), color="black", linewidth=0.8)
        axes.annotate(f"{unit}: {ceilings[unit] / 1e15:.3g} P/s", (span[-1], ceilings[unit]), ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of memory", ylabel="operations a second")
    axes.set_title(f"kernels alone on {result['settings']['device']}; every product of two planes counts")
    legend(figure)
    save(figure, path)


def plot_ablation(result: dict[str, Any], path: Path, full: str) -> None:
    """Bars of the time of every variant over that of the one named `full`, one colour a shape and precision."""
    variants = [name for row in result["products"].values() for name in row["variants"] if name != full]
    slowdowns = {
        product: {name: figures.get("slowdown") for name, figures in row["variants"].items()}
        for product, row in result["products"].items()
    }
    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    bars(axes, list(dict.fromkeys(variants)), slowdowns)
    axes.set(ylabel="time over that of the full system", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_title(f"one part switched off at a time, {result['settings']['device']}")
    legend(figure)
    save(figure, path)


def _speedups(row: dict[str, Any], part: str) -> dict[str, float | None]:
    return {name: (measured.get(part) or {}).get("speedup") for name, measured in row["precisions"].items()}


def _map(axes, names: list[str], series: dict[str, dict[str, float | None]]) -> None:
    """A row of coloured numbers for each series, red where bf16 is faster; what was not measured stays white."""
    values = np.array([[row.get(name) or np.nan for name in names] for row in series.values()]).reshape(-1, len(names))
    axes.imshow(np.log2(values), cmap="RdYlGn", vmin=-4, vmax=4, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(series)), list(series), fontsize=7)

"""Plots of the matmul benchmark and the ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from experiments.support.plotting import bars, colour, legend, save


def plot_speedup(result: dict[str, Any], path: Path) -> None:
    """Heat maps of the speed-up over bf16 by shape and precision, of the kernel and of the operation."""
    shapes = {name: row for name, row in result["shapes"].items() if row["precisions"]}
    names = list(dict.fromkeys(name for row in shapes.values() for name in row["precisions"]))
    titles = {"kernel": "kernel only", "operation": "operation, including quantization of activations"}
    size = (0.5 * len(names) + 4, 2 * (0.3 * len(shapes) + 1.6))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    for axes, (function, title) in zip(figure.subplots(2, 1, sharex=True), titles.items(), strict=True):
        _heat_map(axes, names, {shape: _speedups(row, function) for shape, row in shapes.items()})
        axes.set_title(title)
    figure.suptitle(f"times as fast as XLA's bf16 product, {result['settings']['device']}")
    save(figure, path)


def plot_roofline(result: dict[str, Any], path: Path) -> None:
    """Roofline plot of the kernels: operations per second over operations per byte, below the device's peak rates."""
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
    for (shape, kind), shape_points in points.items():
        label = f"{shape}, {'binary' if kind == 'planes' else kind}"
        axes.plot(*zip(*shape_points, strict=True), "o" if kind == "planes" else "s", color=colours[shape], label=label)
    intensities = [x for shape_points in points.values() for x, _ in shape_points] or [1.0]
    span = np.geomspace(min(intensities) / 4, max(intensities) * 4, 200)
    for unit in ("binary", "int8", "bf16"):
        axes.plot(span, np.minimum(ceilings[unit], ceilings["bandwidth"] * span), color="black", linewidth=0.8)
        axes.annotate(f"{unit}: {ceilings[unit] / 1e15:.3g} P/s", (span[-1], ceilings[unit]), ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of memory", ylabel="operations per second")
    axes.set_title(f"kernels on {result['settings']['device']}; operations are counted for every pair of planes")
    legend(figure)
    save(figure, path)


def plot_ablation(result: dict[str, Any], path: Path, full: str) -> None:
    """Plots the slowdown of every variant relative to `full`, one colour per shape and precision."""
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
    axes.set_title(f"one optimization disabled at a time, {result['settings']['device']}")
    legend(figure)
    save(figure, path)


def _speedups(row: dict[str, Any], function: str) -> dict[str, float | None]:
    return {name: (measured.get(function) or {}).get("speedup") for name, measured in row["precisions"].items()}


def _heat_map(axes, names: list[str], series: dict[str, dict[str, float | None]]) -> None:
    """One row of coloured numbers per series; red where bf16 is faster, white where nothing was measured."""
    values = np.array([[row.get(name) or np.nan for name in names] for row in series.values()]).reshape(-1, len(names))
    axes.imshow(np.log2(values), cmap="RdYlGn", vmin=-4, vmax=4, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(series)), list(series), fontsize=7)

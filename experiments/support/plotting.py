"""Shared by all plots: grouped bars, colours, a legend, atomic PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np

from bipolar_jax.checkpoint.atomic_write import atomic_write


def bars(axes, names: list[str], series: dict[str, dict[str, float | None]]) -> None:
    """One group of bars per name with one bar per series; None and missing values are left out."""
    width = 0.8 / max(1, len(series))
    for index, (label, values) in enumerate(series.items()):
        heights = [values.get(name) or np.nan for name in names]
        positions = np.arange(len(names)) + (index - (len(series) - 1) / 2) * width
        axes.bar(positions, heights, width, label=label, color=colour(index))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.grid(axis="y", alpha=0.3)


def colour(index: int) -> tuple[float, ...]:
    """The index-th of twenty colours, repeated after the last."""
    return matplotlib.colormaps["tab20"](index % 20)


def legend(figure: matplotlib.figure.Figure) -> None:
    """Draws the legend of the first axes beside the plot."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize=7, loc="outside right upper")


def save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Writes a PNG atomically."""
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)

"""The plot of perplexity against model size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from bipolar_jax import Precision

from .plotting import save

_ROUNDED = ", rounded"


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Draws a result of `Sweep`: one line per activation precision, group size and kind of scales.

    Default scales, integer ones below 7 bits, share the line of their group size. Models that were rounded for
    comparison have dotted lines.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float, str]]] = {}
    rows = [(name, row, "") for name, row in result["precisions"].items()]
    rows += [(name, row, _ROUNDED) for name, row in result.get("rounded", {}).items()]
    for name, row, method in rows:
        if row["perplexity"] is None:  # infinite
            continue
        if not name.startswith("W"):  # layers of several precisions, by rules
            series.setdefault(f"{name}{method}", []).append((row["bytes"] / 1e6, row["perplexity"], name))
            continue
        precision = Precision.parse(name)
        grouping = "per channel" if precision.group_size is None else f"groups of {precision.group_size}"
        grouping += {"f": ", float scales", "i": ", integer scales"}.get(str(precision)[-1], "")
        symmetric = "symmetric " if precision.a_symmetric else ""
        activations = "float" if precision.a_bits is None else f"{symmetric}{precision.a_bits}-bit"
        point = (row["bytes"] / 1e6, row["perplexity"], name)
        series.setdefault(f"{activations} activations, {grouping}{method}", []).append(point)
    for label, points in sorted(series.items()):
        megabytes, perplexities, names = zip(*sorted(points), strict=True)
        axes.plot(megabytes, perplexities, "o:" if label.endswith(_ROUNDED) else "o-", label=label)
        for point in zip(names, megabytes, perplexities, strict=True):
            axes.annotate(
                point[0].partition("g")[0],
                point[1:],
                textcoords="offset points",
                xytext=(2, 5),
                fontsize=8,
                rotation=35,
            )
    baseline = result["baseline"]
    axes.plot(baseline["bytes"] / 1e6, baseline["perplexity"], "k*", markersize=12, label="float32")
    axes.axhline(baseline["perplexity"], color="black", linewidth=0.5, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="size of all weights (MB)", ylabel="perplexity")
    axes.set_title(f"{result['settings']['model']} on {result['settings']['text']}, {baseline['windows']} windows")
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.xaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.legend(fontsize=8)
    save(figure, path)

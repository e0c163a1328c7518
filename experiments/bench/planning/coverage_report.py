"""What the coverage benchmark says: which cases fail, a table by precision and size, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.figure
from rich.table import Table

from experiments.support.plotting import colour, legend, save
from experiments.support.progress import console

_STEADY = 1.1  # times the lower quartile, up to which the upper one is called steady
_SIZES = (("counted, m to 64", 64), ("m to 512", 512), ("m to 2048", 2048), ("above", 2**31))


def speed(row: dict[str, Any]) -> float | None:
    """Times as fast as bf16; None if either was not measured."""
    chosen, bf16 = (row.get(name, {}).get("microseconds") for name in ("chosen", "bf16"))
    return None if chosen is None or bf16 is None else bf16 / chosen


def over_best(row: dict[str, Any]) -> float | None:
    """The time of the chosen plan over that of the best one tried; None if there is no other."""
    times = [figures["microseconds"] for figures in row.get("others", {}).values() if "microseconds" in figures]
    chosen = row.get("chosen", {}).get("microseconds")
    return None if chosen is None or not times else chosen / min(chosen, *times)


def is_counted(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the product is so large that it must not be slower than bf16."""
    return row["m"] * row["n"] * row["k"] >= settings["counted"]


def is_slow(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a counted product is below the least speed."""
    least = settings["least_float"] if "A16" in row["precision"] else settings["least"]
    return is_counted(row, settings) and (speed(row) or 1) < least


def verdicts(name: str, row: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Why a case fails; empty if it passes."""
    if "microseconds" not in row.get("chosen", {}):
        return [f"{name}: {row.get('chosen', {}).get('error', 'no time')}"]
    failures = []
    if is_slow(row, settings):
        failures.append(f"{name}: {speed(row):.2f} of bf16's speed")
    if (over_best(row) or 1) > settings["most_over_best"]:
        times = {other: f["microseconds"] for other, f in row["others"].items() if "microseconds" in f}
        failures.append(
            f"{name}: the chosen plan takes {over_best(row):.2f} times as long as {min(times, key=times.get)}"
        )
    note = ", ".join(_unsteady({"bf16": row.get("bf16", {}), "chosen": row["chosen"]} | row.get("others", {})))
    return [f"{failure} (unsteady: {note})" if note else failure for failure in failures]


def _unsteady(timings: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Of the times whose quartiles lie apart, the quartiles in words."""
    for name, figures in timings.items():
        low, high = figures.get("quartiles", (0.0, 0.0))
        if high > _STEADY * low:
            yield f"{name} takes {low:.1f} to {high:.1f} us"


def print_report(result: dict[str, Any], names: Iterable[str]) -> None:
    """Prints the least and the median speed of each precision by size, and how many cases fail."""
    settings, rows = result["settings"], [result["cases"][name] for name in names if name in result["cases"]]
    table = Table(title=f"times as fast as bf16 (least, median) on {settings['device']}, wall time")
    for heading in ("precision", "cases", *(title for title, _ in _SIZES), "not counted", "over best plan", "fail"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for precision in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        counted, cells, below = [row for row in own if is_counted(row, settings)], [], 0
        for _, most in _SIZES:
            cells.append(_least_and_median([speed(row) for row in counted if below < row["m"] <= most]))
            below = most
        cells.append(_least_and_median([speed(row) for row in own if not is_counted(row, settings)]))
        over = [share for row in own if (share := over_best(row)) is not None]
        failed = sum(bool(verdicts("", row, settings)) for row in own)
        table.add_row(precision, str(len(own)), *cells, f"{max(over):.2f}" if over else "-", str(failed))
    console.print(table)


def _least_and_median(speeds: list[float | None]) -> str:
    known = [each for each in speeds if each is not None]
    return f"{min(known):.2f}, {statistics.median(known):.2f}" if known else "-"


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed over the multiplications of a product, one colour a precision; a ring marks a case that fails."""
    settings = result["settings"]
    figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result["cases"].values() if speed(row) is not None]
    for index, precision in enumerate(dict.fromkeys(row["precision"] for row in rows)):
        own = [row for row in rows if row["precision"] == precision]
        points = [(row["m"] * row["n"] * row["k"], speed(row)) for row in own]
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=colour(2 * index), label=precision)
    failed = [row for row in rows if verdicts("", row, settings)]
    if failed:
        points = [(row["m"] * row["n"] * row["k"], speed(row)) for row in failed]
        axes.plot(*zip(*points, strict=True), "o", markersize=9, fillstyle="none", color="black", label="fails")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axvline(settings["counted"], color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="m * n * k", ylabel="times as fast as bf16, wall")
    axes.set_title(f"whole operations at drawn shapes, {settings['device']}")
    legend(figure)
    save(figure, path)

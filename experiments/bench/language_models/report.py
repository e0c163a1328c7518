"""Speed-ups, tables and the plot of the language model benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
from rich.table import Table

from experiments.support.plotting import bars, legend, save
from experiments.support.progress import console

_PHASES = ("prefill", "decode")


def add_speedups(result: dict[str, Any], baselines: list[str]) -> None:
    """Sets "speedup" of every figure: time of the fastest measured baseline divided by its own time."""
    sections = [result["models"], result["peers"]]
    for workloads in (rows["workloads"] for section in sections for rows in section.values()):
        for name, measured in workloads.items():
            for phase in _PHASES:
                baseline_rows = [result["models"].get(baseline, {}).get("workloads", {}) for baseline in baselines]
                times = [rows[name][phase]["microseconds"] for rows in baseline_rows if phase in rows.get(name, {})]
                if times and phase in measured:
                    measured[phase]["speedup"] = round(min(times) / measured[phase]["microseconds"], 3)


def print_tables(result: dict[str, Any]) -> None:
    """Prints times, speed-ups and memory by workload and precision, then the kernels of the profiled precisions."""
    settings = result["settings"]
    calibration = settings["calibration"] or "default"
    table = Table(title=f"{settings['model']} on {settings['device']}, calibration {calibration}, medians")
    columns = ("workload", "precision", "prefill ms", "x bf16", "decode ms", "x bf16", "tokens/s", "bandwidth", "GB")
    for heading in (*columns, "error"):
        table.add_column(heading, justify="left" if heading in ("workload", "precision") else "right")
    for name in _workloads(result):
        for section in ("models", "peers"):
            for precision, rows in result[section].items():
                if name in rows["workloads"]:
                    table.add_row(name, precision, *_cells(rows["workloads"][name]))
    console.print(table)
    for precision, profile in result["profiles"].items():
        for phase in _PHASES:
            _print_kernels(f"{precision}, {profile['workload']}, {phase}", profile[phase])


def plot_speedup(result: dict[str, Any], path: Path) -> None:
    """Plots the speed-up over bf16 of prefill and decoding: one group per precision, one colour per workload."""
    names = [*result["models"], *result["peers"]]
    rows_of = result["models"] | result["peers"]
    figure = matplotlib.figure.Figure(figsize=(0.9 * len(names) + 4, 8), layout="constrained")
    for axes, phase in zip(figure.subplots(2, 1, sharex=True), _PHASES, strict=True):
        series = {
            workload: {
                name: rows_of[name]["workloads"].get(workload, {}).get(phase, {}).get("speedup") for name in names
            }
            for workload in _workloads(result)
        }
        bars(axes, names, series)
        axes.set(ylabel="times as fast as bf16", title=phase)
    settings = result["settings"]
    figure.suptitle(f"{settings['model']} on {settings['device']}; batch x prompt + new tokens")
    legend(figure)
    save(figure, path)


def line(measured: dict[str, Any]) -> str:
    """The figures of one workload in one line."""
    if "error" in measured:
        return measured["error"]
    times = [f"{phase} {measured[phase]['microseconds'] / 1e3:.3f} ms" for phase in _PHASES]
    return f"{', '.join(times)} per token, {measured['decode']['tokens_per_second']:.0f} tokens/s"


def _workloads(result: dict[str, Any]) -> list[str]:
    rows = [rows["workloads"] for section in ("models", "peers") for rows in result[section].values()]
    return list(dict.fromkeys(name for row in rows for name in row))


def _cells(measured: dict[str, Any]) -> list[str]:
    if "error" in measured:
        return [measured["error"][:60]]
    prefill, decode, memory = measured["prefill"], measured["decode"], measured["memory"]
    needed = None
    if "weight_bytes" in memory:  # peers report their peak memory only
        temporary = max(memory["prefill_temporary_bytes"], memory["decode_temporary_bytes"])
        needed = memory["weight_bytes"] + memory["cache_bytes"] + temporary
    return [
        f"{prefill['microseconds'] / 1e3:.2f}",
        _number(prefill.get("speedup")),
        f"{decode['microseconds'] / 1e3:.3f}",
        _number(decode.get("speedup")),
        f"{decode['tokens_per_second']:.0f}",
        "-" if "bandwidth_share" not in decode else f"{decode['bandwidth_share']:.0%}",
        "-" if needed is None else f"{needed / 1e9:.2f}",
        "-" if "check_error" not in measured else f"{measured['check_error']:.1g}",
    ]


def _print_kernels(title: str, profile: dict[str, Any]) -> None:
    if not profile["kernels"]:
        return
    table = Table(title=f"{title}: {profile['microseconds']:.1f} us of kernels")
    for heading in ("kernel", "microseconds", "share", "calls"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel in profile["kernels"]:
        share = kernel["microseconds"] / profile["microseconds"]
        table.add_row(kernel["name"][:70], f"{kernel['microseconds']:.1f}", f"{share:.0%}", f"{kernel['calls']:g}")
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

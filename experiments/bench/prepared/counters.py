"""Reads hardware counters of an operation's kernels with Nsight Compute, on one GPU: what bounds each of them.

    python -m experiments.bench.prepared.counters --cases="64x14336x4096 W4A8g128; 2048x14336x4096 W4A8g32f" --out=FILE

Operations are those that users call, quantization included. Each runs twice; ncu profiles the second run, with clocks
as they are and caches as the first run left them. Of every kernel: its time; how much of the peak the tensor cores, the
pipes, the schedulers' issue slots and the memory reached; and why its warps waited, in warps that wait for a reason per
instruction that is issued. Counters need ncu and a machine that lets it read them.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
from rich.table import Table

from bipolar_jax import Precision
from experiments.bench.planning.cases import Case
from experiments.bench.products.shapes import parse_shapes
from experiments.support.progress import console
from experiments.support.workdir import environment, write_json

CASES = "; ".join(
    f"{shape} {precision}"
    for shape, precisions in (
        ("2048x14336x4096", ("W4A8", "W4A8g32", "W4A8g32f")),
        ("64x28672x4096", ("W4A8", "W4A8g128")),
    )
    for precision in precisions
)
_STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# What a table shows, by ncu's name. Shares of a peak are over the time that the multiprocessor was active.
COUNTERS = {
    "gpu__time_duration.sum": "us",
    "sm__inst_executed.sum": "instructions",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores %",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "alu %",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "fma %",
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active": "lsu %",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared memory %",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "dram__bytes_read.sum.pct_of_peak_sustained_elapsed": "DRAM %",
    "dram__bytes_read.sum": "DRAM bytes",
    "launch__registers_per_thread": "registers",
} | {
    _STALLED.format(reason): f"waits: {reason}"
    for reason in (
        "barrier",
        "branch_resolve",
        "dispatch_stall",
        "gmma",
        "long_scoreboard",
        "math_pipe_throttle",
        "mio_throttle",
        "no_instruction",
        "not_selected",
        "short_scoreboard",
        "sleeping",
        "wait",
    )
}


def parse_cases(text: str) -> list[Case]:
    """Reads "64x14336x4096 W4A8g128; ...". Raises ValueError for another text."""
    cases = []
    for item in text.split(";"):
        match item.split():
            case [shape, precision]:
                cases += [Case(each, Precision.parse(precision)) for each in parse_shapes(shape)]
            case _:
                raise ValueError(f'a case is a shape and a precision, such as "64x14336x4096 W4A8", got {item!r}')
    return cases


def profiled_run(case: Case) -> None:
    """Runs the operation twice; between cuProfilerStart and cuProfilerStop is the second run alone."""
    cuda = ctypes.CDLL("libcuda.so.1")
    (x, w), _ = jax.jit(case.make)(jax.random.key(0))
    operation = jax.jit(case.operation)
    jax.block_until_ready(operation(x, w))
    cuda.cuProfilerStart()
    jax.block_until_ready(operation(x, w))
    cuda.cuProfilerStop()


def counters(case: Case, ncu: str) -> list[dict[str, float | str]]:
    """A row of COUNTERS for every kernel of an operation, in the order in which they ran, with its "name".

    Raises:
      RuntimeError: there is no ncu, it failed, or it read no counters.
    """
    if shutil.which(ncu) is None:
        raise RuntimeError(f"{ncu!r} is no program here: give the path of Nsight Compute's ncu as --ncu")
    command = [ncu, "--clock-control=none", "--cache-control=none", "--profile-from-start=off", "--csv", "--page=raw"]
    command += ["--metrics", ",".join(COUNTERS), "--print-units=base"]
    command += [sys.executable, "-m", "experiments.bench.prepared.counters", f"--run={case.name}"]
    # Commands that a CUDA graph launches are not profiled one by one.
    variables = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    rows = parse_counters(ended.stdout)
    if ended.returncode != 0 or not rows:
        last = " | ".join((ended.stdout + ended.stderr).strip().splitlines()[-3:])
        raise RuntimeError(f"{ncu} read no counters of {case.name}, status {ended.returncode}: {last}")
    return rows


def parse_counters(text: str) -> list[dict[str, float | str]]:
    """Reads ncu's CSV, which starts behind the messages of ncu and of the program: names, units, a line a kernel."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = []
    for row in csv.DictReader(lines[start:]):
        if not row["ID"].isdigit():  # units, and messages behind the table
            continue
        figures: dict[str, float | str] = {"name": row["Kernel Name"]}
        for counter, name in COUNTERS.items():
            try:
                figures[name] = float(row[counter].replace(",", ""))
            except (KeyError, ValueError):
                continue  # this GPU or this ncu does not have it
        if "us" in figures:
            figures["us"] = figures["us"] / 1000
        rows.append(figures)
    return rows


def show(case: Case, rows: list[dict[str, float | str]]) -> None:
    """Prints a column for every kernel."""
    table = Table(title=case.name)
    table.add_column("")
    for row in rows:
        table.add_column(str(row["name"])[:28], justify="right")
    for name in COUNTERS.values():
        table.add_row(name, *(f"{row[name]:,.6g}" if name in row else "" for row in rows))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="shapes and precisions, separated by semicolons")
    parser.add_argument("--ncu", default="ncu", help="the program ncu")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--run", help="one case, which is run and not profiled; ncu calls this")
    options = parser.parse_args()
    if options.run:
        (case,) = parse_cases(options.run)
        profiled_run(case)
        return
    figures = {}
    try:
        for case in parse_cases(options.cases):
            figures[case.name] = counters(case, options.ncu)
            show(case, figures[case.name])
            if options.out:
                write_json(options.out, {"environment": environment(), "cases": figures})
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

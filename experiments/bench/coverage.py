"""Times whole operations at drawn shapes beside XLA's bf16 dot through cuBLAS, and fails where they lose.

    python -m experiments.bench.coverage --config=configs/bench/coverage.py --workdir=DIR

Draws shapes and measures every precision from bf16 to bf16, as users call it, with other plans beside the chosen one.
Times are wall times: the median of five runs, each of launches in a row until the last result is ready. A program holds
several calls on operands of their own, so that weights of few tokens come from memory, and launches hide behind each
other as in a model. A case fails where its product is wrong; where it has at least `config.counted` multiplications and
is below `config.least` of bf16's speed (float activations: `config.least_float`); or where the chosen plan takes more
than 1.1 times as long as the best one tried. Kernels of cases that are too slow are profiled.

Tracing takes one core a process. To measure faster start several, which take turns on the GPU (`device_lock`), and
report at the end; the workdir is shared, and a stopped run resumes:

    for part in 0 1 2 3 4 5 6 7; do
        python -m experiments.bench.coverage --config=... --workdir=DIR --config.part=$part/8 --config.seconds=240 &
    done; wait
    python -m experiments.bench.coverage --config=... --workdir=DIR --config.report=True
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bipolar_jax import Precision
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import check_implementation
from experiments.bench.planning.cases import Case, Layout, Operation, layout_of
from experiments.bench.planning.coverage_report import is_slow, plot, print_report, speed, verdicts
from experiments.bench.products.cold_weights import copies_of, few_tokens
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape
from experiments.support import app
from experiments.support.device_lock import device_lock, device_unlocked
from experiments.support.kernel_times import profile_kernels
from experiments.support.progress import console
from experiments.support.timing import Timing, compile_all, one_line, raise_if_error
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

SIZES = (2048, 2560, 3072, 3584, 4096, 5120, 8192, 14336, 18944, 28672)  # of published models' layers
_MOST_TOKENS = 8192
_SETTINGS = ("seed", "iterations", "layout", "implementation", "counted", "least", "least_float", "most_over_best")
_ROW = ("m", "n", "k", "precision")
_RUN_MICROSECONDS = 2000  # of launches in a row
_PROGRAM_MICROSECONDS = 200  # of one launch, which takes the host some 20
_MOST_CALLS = 8  # in a program of many tokens
_WARM_UP_SECONDS = 0.03
_BF16_RATE, _BYTES_RATE = 6e8, 3e6  # operations and bytes a microsecond, for the number of calls
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def draw(count: int, seed: int) -> list[Shape]:
    """Shapes with m from 1 to 8192, log-uniform and every other one rounded to a multiple of 64 (or a power of two)."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, Shape] = {}
    while len(shapes) < count:
        m = round(math.exp(rng.uniform(0, math.log(_MOST_TOKENS))))
        if len(shapes) % 2:
            m = 64 * round(m / 64) if m >= 64 else 2 ** round(math.log2(m))
        n, k = (int(size) for size in rng.choice(SIZES, 2))
        shapes[f"{m}x{n}x{k}"] = Shape(f"{m}x{n}x{k}", m, n, k)
    return list(shapes.values())


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    cases = all_cases(config)
    check_implementation(config.implementation)
    settings = {name: config[name] for name in _SETTINGS} | {"device": jax.devices()[0].device_kind}
    settings["kernels_sha256"] = kernels_fingerprint()
    result = read_result(workdir, settings, {"cases": _ROW}) or {"settings": settings, "cases": {}}
    result["environment"] = environment()
    if not config.report:
        _measure_all(part_of(cases, config.part), config, workdir, result)
    if config.report or config.part == "0/1":
        plot(result, workdir / "speed.png")
        print_report(result, [case.name for case in cases])
        console.print(f"results and plot: {workdir}")
        failures = [line for name, row in result["cases"].items() for line in verdicts(name, row, settings)]
        missing = sum(case.name not in result["cases"] for case in cases)
        if failures or missing:
            lines = "".join(f"\n  {line}" for line in failures)
            console.print(f"fails:{lines}" if failures else "nothing fails")
            raise RuntimeError(f"{len(failures)} failures in {len(cases)} cases, of which {missing} are not measured")


def all_cases(config: ConfigDict) -> list[list[Case]] | list[Case]:
    """The cases of the config, those of one shape after the other.

    Raises:
      ValueError: an unknown layout or precision, or no shapes.
    """
    if config.layout not in get_args(Layout):
        raise ValueError(f"config.layout must be one of {', '.join(get_args(Layout))}, got {config.layout!r}")
    if config.shapes < 1:
        raise ValueError(f"config.shapes must be at least 1, got {config.shapes}")
    precisions = [Precision.parse(text) for text in app.split_names(config.precisions)]
    options = (config.implementation, config.layout, config.seed)
    shapes = draw(config.first + config.shapes, config.seed)[config.first :]
    return [Case(shape, precision, *options) for shape in shapes for precision in precisions]


def part_of(cases: list[Case], text: str) -> list[Case]:
    """Of the shapes, every n-th from the i-th on, for the text "i/n". Raises ValueError for another text."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f'config.part must be "i/n" with i below n, got {text!r}')
    shapes = list(dict.fromkeys(case.shape for case in cases))[int(match[1]) :: int(match[2])]
    return [case for case in cases if case.shape in shapes]


def _measure_all(cases: list[Case], config: ConfigDict, workdir: Path, result: dict[str, Any]) -> None:
    deadline = time.monotonic() + (config.seconds or math.inf)
    with device_lock():
        for case in cases:
            if time.monotonic() > deadline:
                console.print(f"stops before {case.name}: {config.seconds} s are over")
                return
            if "microseconds" in result["cases"].get(case.name, {}).get("chosen", {}):
                continue
            shape = case.shape
            row: dict[str, Any] = {"m": shape.m, "n": shape.n, "k": shape.k, "precision": str(case.precision)}
            try:
                _measure(case, row, config)
            except Exception as error:
                row["chosen"] = {"error": one_line(error)}
            result["cases"][case.name] = row
            save_result(workdir, result, cases=[case.name])
            console.print(f"{case.name}: {_line(row)}")


def _measure(case: Case, row: dict[str, Any], config: ConfigDict) -> None:
    """Fills a row: bf16, the chosen plan, others, and where the chosen one is too slow its kernels.

    Raises:
      Exception: bf16 or the chosen plan did not compile or run, or gave wrong numbers.
    """
    calls = _calls(case.shape, case.weights)
    key = jax.random.key(case.seed)
    with device_unlocked():
        others = case.others(config.plans)
        operations: dict[str, Operation] = {"chosen": case.operation}
        operations |= {name: plan.operation for name, plan in others.items()}
        operands = jax.eval_shape(case.make, key)[0]
        todo = {name: (_repeated(operation), (operands,) * calls) for name, operation in operations.items()}
        compiled = compile_all(todo | {"make": (case.make, (key,))}, config.compile_threads)
    row["plan"] = _plan(case)
    dense, of_dense = _dense(case.shape, case.seed)
    row["bf16"] = wall(dense, of_dense, len(of_dense), config.iterations).to_json()
    make = raise_if_error(compiled["make"])
    made = [make(each) for each in jax.random.split(key, calls)]
    copies, sample = tuple(args for args, _ in made), made[0][1]
    row["others"], layout = {}, layout_of(case.weights)
    for name in operations:
        try:
            function = raise_if_error(compiled[name])
            error = case.check(function(*copies)[0], sample)
            figures = wall(function, copies, calls, config.iterations).to_json() | {"error of sums": error}
        except Exception as error:
            if name == "chosen":
                raise
            figures = {"error": one_line(error)}
        if name == "chosen":
            row["chosen"] = figures
        else:
            row["others"][name] = figures | others[name].to_json() | {"layout": layout}
    if is_slow(row, {name: config[name] for name in _SETTINGS}):
        profile = profile_kernels(lambda: jax.block_until_ready(compiled["chosen"](*copies)), calls, most=6)
        row["kernels"] = profile["kernels"]


def _calls(shape: Shape, weights: Any) -> int:
    """Calls in a program: of few tokens as many as read more weights than L2 holds, else to fill some time."""
    if few_tokens(shape):
        return copies_of(weights)
    nbytes = 2 * (shape.m * shape.k + shape.n * shape.k + shape.m * shape.n)
    estimate = max(shape.operations / _BF16_RATE, nbytes / _BYTES_RATE)
    return max(1, min(_MOST_CALLS, math.ceil(_PROGRAM_MICROSECONDS / estimate)))


def _repeated(operation: Operation) -> Callable[..., list[jax.Array]]:
    jitted = jax.jit(operation)  # traced and lowered once for all calls
    return lambda *copies: [jitted(*args) for args in copies]


def _plan(case: Case) -> dict[str, Any]:
    try:
        plan = case.plan
    except Unsupported as reason:
        return {"refused": str(reason)}
    tiling = {} if plan.tiling is None else dataclasses.asdict(plan.tiling)
    kind = getattr(plan, "kind", None)
    return {"reason": plan.reason, "tiling": tiling, "kind": kind, "layout": layout_of(case.weights)}


@functools.lru_cache(maxsize=1)  # a shape's precisions follow each other
def _dense(shape: Shape, seed: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The bf16 product through cuBLAS, compiled, and its operands. The device is locked: XLA autotunes on it."""

    def make(key):
        operands = Operands(shape, seed, key)
        return operands.x, operands.dense_w

    key = jax.random.key(seed)
    operands = jax.eval_shape(make, key)
    calls = _calls(shape, operands[1])
    options = _CUBLAS if jax.devices()[0].platform == "gpu" else {}
    function = jax.jit(_repeated(jnp.dot)).lower(*((operands,) * calls)).compile(options)
    compiled_make = jax.jit(make)
    return function, tuple(compiled_make(each) for each in jax.random.split(key, calls))


def wall(function: Callable[..., Any], args: tuple[Any, ...], calls: int, iterations: int) -> Timing:
    """Wall time of one of the calls in a program: runs of launches in a row, until the last result is ready."""
    started, launches = time.perf_counter(), 0
    while launches == 0 or time.perf_counter() - started < _WARM_UP_SECONDS:
        jax.block_until_ready(function(*args))
        launches += 1
    once = 1e6 * (time.perf_counter() - started) / launches
    launches = max(1, math.ceil(_RUN_MICROSECONDS / once))
    runs = []
    for _ in range(iterations):
        started = time.perf_counter()
        for _ in range(launches):
            last = function(*args)
        jax.block_until_ready(last)
        runs.append(1e6 * (time.perf_counter() - started) / launches)
    return Timing.of(runs, "wall").divided(calls)


def _line(row: dict[str, Any]) -> str:
    if "microseconds" not in row["chosen"]:
        return row["chosen"]["error"]
    text = f"bf16 {row['bf16']['microseconds']:.1f} us, {row['chosen']['microseconds']:.1f} us, {speed(row):.2f}x"
    times = {name: other["microseconds"] for name, other in row["others"].items() if "microseconds" in other}
    if times:
        best = min(times, key=times.get)
        text += f"; best other {times[best]:.1f} us ({best})"
    for kernel in row.get("kernels", ()):
        text += f"\n    {kernel['microseconds']:.1f} us {kernel['name'][:80]}"
    return text


if __name__ == "__main__":
    app.run(main)

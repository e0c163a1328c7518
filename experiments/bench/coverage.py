"""Times whole operations at drawn shapes beside XLA's bf16 dot through cuBLAS, and fails where they lose.

    python -m experiments.bench.coverage --config=configs/bench/coverage.py --workdir=DIR

Draws shapes and measures every precision from bf16 to bf16, as users call it, with other plans beside the chosen one.
Times are wall times on an idle host: nobody traces or compiles meanwhile, and nothing was profiled before in the
process. Runs of bf16, of the chosen plan and of the others take turns, each until the last result is ready; the median
is taken, of more turns where they differ. A program holds several calls on operands of their own, so that weights of
few tokens come from memory, repeats them for some milliseconds with the host ahead, as a model's kernels are queued,
and writes its products in place (`planning/queued.py`). A case fails where its product is wrong; where it has at least
`config.counted` multiplications and is below `config.least` of bf16's speed (float activations: `config.least_float`);
or where the chosen plan takes more than 1.1 times as long as the best one tried. Failures whose turns still differ say
so. Kernels of cases that are too slow are profiled in the end.

Tracing takes one core a process. To measure faster start several: all trace for 0.4 of the seconds, then they measure
in turn. The workdir is shared, a run resumes, and one more process reports:

    export XLA_PYTHON_CLIENT_PREALLOCATE=false
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
from bipolar_jax.format import as_format
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import check_implementation
from experiments.bench.planning.cases import Case, Layout, Operation, OtherPlan, Sample, layout_of
from experiments.bench.planning.coverage_report import is_slow, plot, print_report, speed, verdicts
from experiments.bench.planning.queued import Queued, result_shapes, several_calls, take_turns
from experiments.bench.products.cold_weights import copies_of, few_tokens
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape
from experiments.support import app
from experiments.support.device_lock import device_lock
from experiments.support.kernel_times import profile_kernels
from experiments.support.progress import console
from experiments.support.timing import compile_all, one_line, raise_if_error
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

SIZES = (2048, 2560, 3072, 3584, 4096, 5120, 8192, 14336, 18944, 28672)  # of published models' layers
_MOST_TOKENS = 8192
_SETTINGS = ("seed", "iterations", "layout", "implementation", "counted", "least", "least_float", "most_over_best")
_ROW = ("m", "n", "k", "precision")
_MEASURED_SHARE = 0.85  # of the seconds; the others are for profiles
_TRACED_SHARE = 0.5  # of what is left of these, for a batch
_SAVED_SECONDS = 5.0
_CALLS_MICROSECONDS = 200  # of calls on operands of their own
_MOST_CALLS = 8  # in a program of many tokens
# Of a launch, so that what the host takes before the first kernel and after the last, some 50, is 1%.
_PROGRAM_MICROSECONDS = 6000
_BF16_RATE, _BYTES_RATE = 6e8, 3e6  # operations and bytes a microsecond, for the number of calls
_LEAST_MICROSECONDS = 5.0  # of a call
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


@dataclasses.dataclass
class _Compiled:
    """What one case measures.

    Attributes:
      programs: compiled operations by name, "chosen" and other plans, with "make" for the operands of a key and "pick"
        for the sampled numbers of a product; an exception in place of those that did not compile.
      others: the other plans.
      calls: in a program.
      repeats: of these calls.
      like: shapes of their products.
    """

    programs: dict[str, Any]
    others: dict[str, OtherPlan]
    calls: int
    repeats: int
    like: list[Any]

    def start(self, name: str, operands: tuple[tuple[Any, ...], ...]) -> Queued:
        """A program that has run. Raises what its compilation raised."""
        return Queued.start(raise_if_error(self.programs[name]), operands, self.like, self.repeats)


def _measure_all(cases: list[Case], config: ConfigDict, workdir: Path, result: dict[str, Any]) -> None:
    todo = [case for case in cases if "microseconds" not in result["cases"].get(case.name, {}).get("chosen", {})]
    started, seconds = time.monotonic(), config.seconds or math.inf
    deadline = started + _MEASURED_SHARE * seconds
    slow: list[tuple[Case, _Compiled]] = []
    for first in range(0, len(todo), config.batch):
        now = time.monotonic()
        traced_by = now + _TRACED_SHARE * (deadline - now)
        compiled: list[tuple[Case, _Compiled | Exception]] = []
        for case in todo[first : first + config.batch]:
            if time.monotonic() < traced_by:
                with device_lock(shared=True):  # nobody measures beside it
                    compiled.append((case, _attempt(_compile, case, config)))
        slow += _measure_batch(compiled, deadline, config, workdir, result)
        if time.monotonic() > deadline or len(compiled) < len(todo[first : first + config.batch]):
            console.print(f"stops: {config.seconds} s are over")
            break
    for case, own in slow:
        if time.monotonic() < started + seconds:
            with device_lock():
                result["cases"][case.name]["kernels"] = _kernels(case, own)
                save_result(workdir, result, cases=[case.name])
            console.print(f"{case.name}: {_line(result['cases'][case.name])}")


def _measure_batch(
    compiled: list[tuple[Case, _Compiled | Exception]],
    deadline: float,
    config: ConfigDict,
    workdir: Path,
    result: dict[str, Any],
) -> list[tuple[Case, _Compiled]]:
    """Measures until the deadline. Returns the cases that are too slow."""
    settings, unsaved, slow, saved = {name: config[name] for name in _SETTINGS}, [], [], time.monotonic()
    for number, (case, own) in enumerate(compiled, 1):
        with device_lock():  # for the result, too, which processes merge
            is_last = number == len(compiled) or time.monotonic() > deadline
            shape = case.shape
            row: dict[str, Any] = {"m": shape.m, "n": shape.n, "k": shape.k, "precision": str(case.precision)}
            if time.monotonic() <= deadline:
                try:
                    _measure(case, raise_if_error(own), row, config)
                except Exception as error:
                    row["chosen"] = {"error": one_line(error)}
                result["cases"][case.name] = row
                unsaved.append(case.name)
                if is_slow(row, settings):
                    slow.append((case, own))
                console.print(f"{case.name}: {_line(row)}")
            if unsaved and (is_last or time.monotonic() - saved > _SAVED_SECONDS):
                save_result(workdir, result, cases=unsaved)
                unsaved, saved = [], time.monotonic()
        if is_last:
            break
    return slow


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, or its exception."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _compile(case: Case, config: ConfigDict) -> _Compiled:
    calls, key = _calls(case.shape, case.weights), jax.random.key(case.seed)
    repeats = _repeats(case.shape, case.weights, calls, _speedup(case.precision))
    others = case.others(config.plans)
    operations: dict[str, Operation] = {"chosen": case.operation}
    operations |= {name: plan.operation for name, plan in others.items()}
    operands = jax.eval_shape(case.make, key)[0]
    like = result_shapes(case.operation, (operands,) * calls)
    todo: dict[str, Any] = {
        name: (several_calls(each, repeats), (like, *(operands,) * calls)) for name, each in operations.items()
    }
    todo["make"] = case.make, (key,)
    todo["pick"] = case.pick, (jax.ShapeDtypeStruct((case.shape.m, case.shape.n), jnp.bfloat16),)
    return _Compiled(compile_all(todo, config.compile_threads), others, calls, repeats, like)


def _measure(case: Case, own: _Compiled, row: dict[str, Any], config: ConfigDict) -> None:
    """Fills a row: bf16, the chosen plan and others.

    Raises:
      Exception: bf16 or the chosen plan did not compile or run, or gave wrong numbers.
    """
    row["plan"] = _plan(case)
    programs = {"bf16": _dense(case.shape, case.seed)}
    copies, sample = _operands(case, own)
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in ("chosen", *own.others):
        try:
            queued = own.start(name, copies)
            errors[name] = case.check(raise_if_error(own.programs["pick"])(queued.results[0]), sample)
            programs[name] = queued
        except Exception as error:
            if name == "chosen":
                raise
            failed[name] = one_line(error)
    timings = take_turns(programs, config.iterations)
    row["bf16"] = timings["bf16"].to_json()
    figures = {name: timings[name].to_json() | {"error of sums": error} for name, error in errors.items()}
    row["chosen"], layout = figures["chosen"], layout_of(case.weights)
    row["others"] = {
        name: (figures[name] if name in figures else {"error": failed[name]}) | plan.to_json() | {"layout": layout}
        for name, plan in own.others.items()
    }


def _operands(case: Case, own: _Compiled) -> tuple[tuple[Any, ...], Sample]:
    make = raise_if_error(own.programs["make"])
    made = [make(each) for each in jax.random.split(jax.random.key(case.seed), own.calls)]
    return tuple(args for args, _ in made), made[0][1]


def _kernels(case: Case, own: _Compiled) -> list[dict[str, Any]]:
    copies, _ = _operands(case, own)
    queued = own.start("chosen", copies)
    return profile_kernels(lambda: jax.block_until_ready(queued.launch()), queued.calls, most=6)["kernels"]


def _calls(shape: Shape, weights: Any) -> int:
    """Calls in a program: of few tokens as many as read more weights than L2 holds, else to fill some time."""
    if few_tokens(shape):
        return copies_of(weights)
    nbytes = 2 * (shape.m * shape.k + shape.n * shape.k + shape.m * shape.n)
    estimate = max(shape.operations / _BF16_RATE, nbytes / _BYTES_RATE)
    return max(1, min(_MOST_CALLS, math.ceil(_CALLS_MICROSECONDS / estimate)))


def _repeats(shape: Shape, weights: Any, calls: int, speedup: float) -> int:
    """Of the calls, at `speedup` times bf16's rate: enough to fill a launch."""
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    estimate = max(shape.operations / (speedup * _BF16_RATE), nbytes / _BYTES_RATE, _LEAST_MICROSECONDS)
    return max(1, math.ceil(_PROGRAM_MICROSECONDS / (calls * estimate)))


def _speedup(precision: Precision) -> float:
    """Times as fast as bf16's at most that products run on the tensor cores: int8 ones twice, binary ones 16 times."""
    if precision.a_bits is None:
        return 1
    return max(2, 16 / (as_format(precision.w_bits).bits * precision.a_bits))


def _plan(case: Case) -> dict[str, Any]:
    try:
        plan = case.plan
    except Unsupported as reason:
        return {"refused": str(reason)}
    tiling = {} if plan.tiling is None else dataclasses.asdict(plan.tiling)
    kind = getattr(plan, "kind", None)
    return {"reason": plan.reason, "tiling": tiling, "kind": kind, "layout": layout_of(case.weights)}


@functools.lru_cache(maxsize=1)  # a shape's precisions follow each other
def _dense(shape: Shape, seed: int) -> Queued:
    """The bf16 product through cuBLAS, which has run. The device is locked: XLA autotunes on it."""

    def make(key):
        operands = Operands(shape, seed, key)
        return operands.x, operands.dense_w

    key = jax.random.key(seed)
    operands = (jax.eval_shape(make, key),)
    weights = operands[0][1]
    operands *= _calls(shape, weights)
    repeats = _repeats(shape, weights, len(operands), 1)
    options = _CUBLAS if jax.devices()[0].platform == "gpu" else {}
    like = result_shapes(jnp.dot, operands)
    compiled = several_calls(jnp.dot, repeats).lower(like, *operands).compile(options)
    compiled_make = jax.jit(make)
    copies = tuple(compiled_make(each) for each in jax.random.split(key, len(operands)))
    return Queued.start(compiled, copies, like, repeats)


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

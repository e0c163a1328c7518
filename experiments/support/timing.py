"""Medians of device time, and compilation of many functions at once."""

from __future__ import annotations

import concurrent.futures
import contextvars
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# The clocks of an idle GPU are low and take milliseconds of work to rise.
_WARM_UP_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of several runs of one function.

    Attributes:
      median: of all runs.
      low: first quartile.
      high: third quartile.
      iterations: number of runs.
      clock: "device" (sum of the times of all kernels of a run, gaps between them left out) or
        "wall" (from the call until the result is there).
    """

    median: float
    low: float
    high: float
    iterations: int
    clock: str

    @classmethod
    def of(cls, microseconds: list[float], clock: str) -> Timing:
        """The statistics of a list of measurements."""
        low, median, high = (
            statistics.quantiles(microseconds, n=4, method="inclusive") if len(microseconds) > 1 else microseconds * 3
        )
        return cls(round(median, 3), round(low, 3), round(high, 3), len(microseconds), clock)

    def divided(self, calls: int) -> Timing:
        """Of one call, where every run made several."""
        return dataclasses.replace(
            self, **{name: round(getattr(self, name) / calls, 3) for name in ("median", "low", "high")}
        )

    def to_json(self) -> dict[str, Any]:
        """What result files hold."""
        return {
            "microseconds": self.median,
            "quartiles": [self.low, self.high],
            "iterations": self.iterations,
            "clock": self.clock,
        }


def measure(function: Callable[..., Any], *args: Any, iterations: int) -> Timing:
    """Times a jitted or compiled function, warmed up.

    On a GPU CUPTI times every kernel, which leaves out launches and whatever else the
    host does; elsewhere it is the time on the wall. Runs follow each other on the same
    operands, so that what fits the cache stays there.

    Raises:
      RuntimeError: no kernel ran, or runs differ in their kernels.
    """
    jax.block_until_ready(function(*args))
    if jax.devices()[0].platform != "gpu":
        return Timing.of([_wall_microseconds(function, args) for _ in range(iterations)], "wall")
    from jax.experimental.mosaic.gpu import profiler

    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP_SECONDS:
        jax.block_until_ready(function(*args))
    _, milliseconds = profiler.measure(function, iterations=iterations)(*args)
    if milliseconds is None:
        raise RuntimeError("no kernel ran on the GPU: nothing to time")
    if iterations == 1:
        milliseconds = [milliseconds]
    return Timing.of([1e3 * ms for ms in milliseconds], "device")


def _wall_microseconds(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    return 1e6 * (time.perf_counter() - started)


def compile_all[Name](
    functions: Mapping[Name, tuple[Callable[..., Any], tuple[Any, ...]]], threads: int
) -> dict[Name, jax.stages.Compiled | Exception]:
    """Compiles functions of arrays, several at a time; what fails is returned in place of the function.

    Args:
      functions: (function, its arguments) by name.
      threads: compilations at a time.
    """

    def attempt(function, args):
        try:
            return jax.jit(function).lower(*args).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # A copy of the context each, so that interpret mode, where it is on, is on in the threads too.
        futures = {
            name: pool.submit(contextvars.copy_context().run, attempt, function, args)
            for name, (function, args) in functions.items()
        }
        return {name: future.result() for name, future in futures.items()}


def one_line(error: Exception) -> str:
    """An exception's kind and the first line of what it says, for result files."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

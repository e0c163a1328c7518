"""Device timings of functions, seconds of compilations, and parallel compilation."""

from __future__ import annotations

import concurrent.futures
import contextvars
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.monitoring

# An idle GPU runs at low clocks, which rise within milliseconds under load.
_WARM_UP_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Timing:
    """Statistics over several runs of one function, in microseconds.

    Attributes:
      median: median of all runs.
      low: first quartile.
      high: third quartile.
      iterations: number of runs.
      clock: "device" (sum over the kernels of a run, without the gaps between them), "wall" (from the call
        until the result is ready), or a description of another clock.
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
        """The time of one call, for runs of several calls each."""
        return dataclasses.replace(
            self, **{name: round(getattr(self, name) / calls, 3) for name in ("median", "low", "high")}
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that result files store."""
        return {
            "microseconds": self.median,
            "quartiles": [self.low, self.high],
            "iterations": self.iterations,
            "clock": self.clock,
        }


@dataclasses.dataclass(frozen=True)
class Compilations:
    """Seconds of each compilation so far; those that run side by side count each."""

    seconds: list[float]

    @classmethod
    def listen(cls) -> Compilations:
        """Counts from now on."""
        found: list[float] = []

        def add(event: str, duration: float, **_: Any) -> None:
            if "backend_compile" in event:
                found.append(duration)

        jax.monitoring.register_event_duration_secs_listener(add)
        return cls(found)

    def since(self, start: int) -> dict[str, Any]:
        """Number and seconds of those after the first `start`."""
        new = self.seconds[start:]
        return {"compilations": len(new), "compile_seconds": round(sum(new), 2)}


def measure(function: Callable[..., Any], *args: Any, iterations: int) -> Timing:
    """Times a jitted or compiled function after a warm-up.

    On a GPU, CUPTI times every kernel; launches and host work do not count. Elsewhere the clock is
    wall time. All runs use the same operands, so operands that fit the L2 cache stay in it.

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
    """Compiles several functions of arrays in parallel.

    Args:
      functions: (function, arguments) by name; a jitted function keeps its options.
      threads: number of concurrent compilations.

    Returns:
      The compiled function by name, or the exception that its compilation raised; see `raise_if_error`.
    """

    def attempt(function, args):
        try:
            jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
            return jitted.lower(*args).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # Threads do not inherit the context, which holds the interpret mode: copy it.
        futures = {
            name: pool.submit(contextvars.copy_context().run, attempt, function, args)
            for name, (function, args) in functions.items()
        }
        return {name: future.result() for name, future in futures.items()}


def raise_if_error[Function](compiled: Function | Exception) -> Function:
    """An entry of `compile_all`'s result; raises it if it is an exception."""
    if isinstance(compiled, Exception):
        raise compiled
    return compiled


def one_line(error: Exception) -> str:
    """The exception's type and the first line of its message, for result files."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""Wall times of calls that are queued in a row, with the device busy and the host ahead, as within a model.

A program repeats its calls in a loop: XLA launches the body, a CUDA graph where it has five kernels or more, as often
as the loop turns, and nobody waits between. A time holds kernels and the gaps between them. Where a launch was only a
few calls, 311 x 5120 x 3072 took 22 to 43 us, of which kernels were 8 to 17, and turns differed by a third;
134 x 5120 x 28672 in bf16 took 104 us, of which its kernel was 78.

A program is given its last results, donated, and writes the new ones there, so that arrays lie where they lay at the
launch before, and XLA need not change its CUDA graph.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.support.timing import Timing

_RUN_MICROSECONDS = 2000  # of launches in a row
_WARM_UP_SECONDS = 0.03
_SPREAD = 0.03  # of the quartiles, as a share of the median: more takes more turns
_MOST_TURNS = 4  # times the iterations


def several_calls(function: Callable[..., jax.Array], repeats: int = 1) -> jax.stages.Wrapped:
    """A jitted function of (results, *operands of each call) that returns the list of results; see `Queued`.

    All calls are repeated so many times, one after the other. The results that go in are donated: only their places
    are used.
    """
    jitted = jax.jit(function)  # traced and lowered once for all calls

    def calls(results, *operands):
        return [jitted(*each) for each in operands]

    def in_loop(results, *operands):
        def turn(_, results):
            # Operands that seem to depend on the last results: else XLA would multiply once, before the loop.
            return calls(*lax.optimization_barrier((results, *operands)))

        return lax.fori_loop(0, repeats, turn, results)

    return jax.jit(calls if repeats == 1 else in_loop, donate_argnums=0, keep_unused=True)


def result_shapes(function: Callable[..., jax.Array], operands: tuple[tuple[Any, ...], ...]) -> list[Any]:
    """Shapes and dtypes of the results of the calls, which `several_calls` takes first."""
    return [jax.eval_shape(function, *each) for each in operands]


@dataclasses.dataclass
class Queued:
    """A compiled program of several calls with its operands.

    Attributes:
      compiled: of `several_calls`.
      operands: of each call.
      results: of the last launch; at first any arrays of `result_shapes`.
      repeats: of all calls in a launch.
    """

    compiled: Callable[..., list[jax.Array]]
    operands: tuple[tuple[Any, ...], ...]
    results: list[jax.Array]
    repeats: int = 1

    @classmethod
    def start(
        cls,
        compiled: Callable[..., list[jax.Array]],
        operands: tuple[tuple[Any, ...], ...],
        like: Any,
        repeats: int = 1,
    ) -> Queued:
        """A program that has run once, with results of the shapes `like`."""
        queued = cls(compiled, operands, jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), like), repeats)
        jax.block_until_ready(queued.launch())
        return queued

    def launch(self) -> list[jax.Array]:
        """Results of every call, not yet ready, in place of the last ones, which are no longer valid."""
        self.results = self.compiled(self.results, *self.operands)
        return self.results

    @property
    def calls(self) -> int:
        """Calls of a launch."""
        return len(self.operands) * self.repeats


def take_turns(programs: dict[str, Queued], iterations: int) -> dict[str, Timing]:
    """Wall times of one call of each program: runs of launches in a row, until the last result is ready.

    Args:
      programs: by name.
      iterations: turns of each; up to four times as many while the quartiles of one differ by 3%. Every turn has an
        order of its own: clocks that a product lowered are those at which the next one begins.
    """
    launches, runs = {}, {name: [] for name in programs}
    for name, program in programs.items():
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < _WARM_UP_SECONDS / len(programs):
            jax.block_until_ready(program.launch())
            count += 1
        once = 1e6 * (time.perf_counter() - started) / count
        launches[name] = max(1, math.ceil(_RUN_MICROSECONDS / once))
    order = random.Random(0)
    for turn in range(1, _MOST_TURNS * iterations + 1):
        for name in order.sample(list(programs), len(programs)):
            program = programs[name]
            started = time.perf_counter()
            for _ in range(launches[name]):
                program.launch()
            jax.block_until_ready(program.results)
            runs[name].append(1e6 * (time.perf_counter() - started) / (launches[name] * program.calls))
        if turn >= iterations:
            timings = {name: Timing.of(own, "wall") for name, own in runs.items()}
            if all(each.high - each.low <= _SPREAD * each.median for each in timings.values()):
                break
    return timings

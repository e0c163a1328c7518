"""One case of the GPU suite: programs, compiled ahead by threads, and the check of what they return."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

# Mosaic's custom call; beside it in the serialized module, the kernel's name.
_CUSTOM_CALL = 'custom_call_target="mosaic_gpu'
_KERNEL_NAME = re.compile(r"\\00(\w+)_mosaic_gpu\b")
# After these errors the CUDA context is lost: every later launch of the process fails, too.
_CONTEXT_LOST = re.compile(r"CUDA_ERROR_(ILLEGAL|LAUNCH|MISALIGNED|HARDWARE|ASSERT)|unspecified launch failure")
# Calls of a program whose outputs must be the same; one is enough under a sanitizer.
REPEATS = int(os.environ.get("GPU_TEST_REPEATS", "3"))


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays and its operands.

    Attributes:
      function: jitted for the suite.
      operands: pytrees of arrays, NumPy's or JAX's.
      kernel: what the name of one of its Mosaic kernels must contain; None asks for any kernel.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    kernel: str | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """Programs by name, and a check that calls them compiled and raises AssertionError where they are wrong."""

    programs: Mapping[str, Program]
    check: Callable[[Mapping[str, Callable[..., Any]]], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A named trial. `make` draws its operands; it runs in the thread that compiles."""

    name: str
    make: Callable[[], Trial]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case: `error` is None if it passed."""

    name: str
    error: str | None
    seconds: float
    kernels: tuple[str, ...] = ()


def one_program(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    check: Callable[[Any], None],
    *,
    kernel: str | None = None,
) -> Trial:
    """A trial of one program, called `REPEATS` times: the outputs must be the same bit for bit, and pass the check."""

    def check_repeated(compiled):
        check(repeated(functools.partial(compiled["program"], *operands)))

    return Trial({"program": Program(function, operands, kernel)}, check_repeated)


def repeated(call: Callable[[], Any]) -> Any:
    """The output as NumPy arrays. Raises AssertionError if it changes from call to call, as with a race."""
    first = jax.device_get(call())
    for _ in range(REPEATS - 1):
        for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(jax.device_get(call())), strict=True):
            if np.asarray(before).tobytes() != np.asarray(after).tobytes():
                different = np.count_nonzero(np.asarray(before) != np.asarray(after))
                raise AssertionError(f"{different} of {before.size} numbers change when the program is called again")
    return first


def run_cases(
    cases: Iterable[Case],
    threads: int,
    started: Callable[[str], None] = lambda name: None,
    around: Callable[[str], contextlib.AbstractContextManager] | None = None,
) -> Iterator[Outcome]:
    """Runs cases in order while the next ones are compiled.

    Args:
      cases: what to run.
      threads: that compile; operands of three cases a thread are in memory at a time.
      started: called with a case's name before it is waited for.
      around: context for lowering and compiling the program of a name; with it nothing is compiled ahead, and
        programs need no kernels: for interpret mode.
    """
    if around is not None:
        for case in cases:
            started(case.name)
            yield _outcome(case, functools.partial(_prepare, case, around))
        return
    with ThreadPoolExecutor(threads) as pool:
        remaining, ahead = iter(cases), collections.deque()
        lost = None
        for case in itertools.chain(itertools.islice(remaining, 3 * threads), itertools.repeat(None)):
            if case is not None:
                ahead.append((case, pool.submit(_prepare, case)))
                continue
            if not ahead:
                return
            case, prepared = ahead.popleft()
            if (following := next(remaining, None)) is not None:
                ahead.append((following, pool.submit(_prepare, following)))
            started(case.name)
            if lost is not None:
                yield Outcome(case.name, f"not run: the CUDA context was lost in {lost}", 0.0)
                continue
            outcome = _outcome(case, prepared.result)
            if outcome.error is not None and _CONTEXT_LOST.search(outcome.error):
                lost = case.name
            yield outcome


def _prepare(case: Case, around=None):
    trial = case.make()
    compiled, kernels = {}, []
    for name, program in trial.programs.items():
        with contextlib.nullcontext() if around is None else around(name):
            compiled[name] = jax.jit(program.function).lower(*program.operands).compile()
        if around is None:
            kernels += _kernels(compiled[name].as_text(), program.kernel)
    return trial, compiled, tuple(dict.fromkeys(kernels))


def _kernels(text: str, wanted: str | None) -> list[str]:
    """Names of the Mosaic kernels of a compiled program. Raises AssertionError if there is none, or not the wanted."""
    names = sorted(set(_KERNEL_NAME.findall(text)) - {"stable"})
    if _CUSTOM_CALL not in text or (wanted is not None and not any(wanted in name for name in names or [text])):
        raise AssertionError(f"the program runs {wanted or 'none of our kernels'}: found {', '.join(names) or 'none'}")
    return names


def _outcome(case: Case, prepare: Callable[[], Any]) -> Outcome:
    begun, kernels, error = time.perf_counter(), (), None
    try:
        trial, compiled, kernels = prepare()
        trial.check(compiled)
    except Exception as raised:  # a wrong case must not keep the others from running
        error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:600]}"
    return Outcome(case.name, error, time.perf_counter() - begun, kernels)

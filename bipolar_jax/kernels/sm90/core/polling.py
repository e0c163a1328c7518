"""Polling global memory until other thread blocks have written it, for a bounded time.

Blocks that wait for each other must all be resident. Mosaic launches an ordinary grid (JAX 0.11.2 has no cooperative
launch), so nothing promises that: another kernel may hold a multiprocessor. A wait that exceeds its limit traps. The
host gets a CUDA error at its next synchronization, and the process has to be restarted, as after any device fault.
The device prints no message: a call of vprintf or __assertfail makes ptxas serialize the kernel's wgmma (C7510).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import thread_index
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

_REGISTERS = """
      .reg .pred done, again, first;
      .reg .b32 state, low, now;
      .reg .b64 time;"""
# Fields of `state` in a polling loop: the phase bit, a count of polls, and the time of the first check.
_COUNT_UNIT, _COUNT_MASK, _TIME_UNIT = 1 << 1, (1 << 10) - (1 << 1), 1 << 10


def poll_words(
    loads: Sequence[tuple[Pointer, int]], phase: Value, needed: Value, limit_ms: int | None
) -> list[list[Value]]:
    """Words in global memory, loaded again and again until the low bit of each is the phase bit.

    Args:
      loads: pointers, and how many consecutive words to load from each, aligned as a whole: 1, 2 or 4.
      phase: the phase bit, 0 or 1.
      needed: 1 to poll, or 0 to load once and return whatever there is: where no block writes the words, or this one
        does not use them.
      limit_ms: milliseconds after which the thread traps; None waits for ever.
    """
    names, instructions, checks = itertools.count(), [], []
    first_pointer = sum(count for _, count in loads)
    for i, (_, count) in enumerate(loads):
        words = [f"${next(names)}" for _ in range(count)]
        vector, target = (f".v{count}", f"{{{', '.join(words)}}}") if count > 1 else ("", words[0])
        instructions.append(f"ld.relaxed.gpu.global{vector}.b32 {target}, [${first_pointer + i}];")
        checks += [f"lop3.b32 off, off, {word}, state, 0xF6;" for word in words]  # off | (word ^ state)
    phase_name, needed_name = (f"${first_pointer + len(loads) + i}" for i in range(2))
    code = f"""{{{_REGISTERS}
      .reg .pred idle;
      .reg .b32 off;
      mov.b32 state, {phase_name};
      setp.eq.b32 idle, {needed_name}, 0;
    AGAIN:
      {" ".join(instructions)}
      mov.b32 off, 0;
      {" ".join(checks)}
      and.b32 off, off, 1;
      setp.eq.or.b32 done, off, 0, idle;
      {_again_or_trap(limit_ms)}
    }}"""
    pointers = [pointer for pointer, _ in loads]
    types = (ptx.i32_type(),) * first_pointer
    words = iter(inline_ptx(code, *pointers, phase, needed, result_types=types, has_side_effects=True))
    return [[next(words) for _ in range(count)] for _, count in loads]


def store_in_phase(ptr: Pointer, word: Value, phase: Value) -> None:
    """Stores a word in global memory, its low bit replaced by the phase bit."""
    word = ptx.either_bits(ptx.bits_of(word, 0xFFFFFFFE), phase)
    inline_ptx("st.relaxed.gpu.global.b32 [$0], $1;", ptr, word, has_side_effects=True)


def await_blocks(semaphore, blocks: int, limit_ms: int) -> None:
    """Waits until all blocks of the grid have signaled; what they wrote before is visible to this warpgroup after.

    `plgpu.semaphore_wait` does the same without a limit. Traps at once on a device with fewer multiprocessors than
    blocks (%nsmid may exceed their number, so that the limit is still needed).

    Args:
      semaphore: in global memory, of `plgpu.semaphore_signal`.
      blocks: of the grid, all of which signal once.
      limit_ms: milliseconds after which the thread traps.
    """
    code = f"""{{{_REGISTERS}
      .reg .b32 count;
      mov.u32 count, %nsmid;
      setp.lt.u32 first, count, {blocks};
      @first trap;
      mov.b32 state, 0;
    AGAIN:
      ld.relaxed.gpu.global.b32 count, [$0];
      setp.ge.u32 done, count, {blocks};
      {_again_or_trap(limit_ms)}
      fence.acq_rel.gpu;
    }}"""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(_, semaphore):
        with ptx.when(ptx.equal(thread_index(), 0)):
            inline_ptx(code, ptx.pointer(semaphore, ptx.GLOBAL), has_side_effects=True)
        ptx.synchronize()

    inline(semaphore)


def _again_or_trap(limit_ms: int | None) -> str:
    """The end of a polling loop: leaves it if `done`, traps after the limit, else jumps to AGAIN.

    No register is free in these loops, so `state` has three fields: the phase bit; 9 bits that count polls, of which
    every 511th reads the timer (that takes as long as a poll); and 22 bits with the time of the first reading, 0 before
    it. Time is in units of 2^20 ns: 22 bits hold more than an hour.
    """
    if limit_ms is None:
        return "@!done bra AGAIN;"
    limit = -(-limit_ms * 10**6 // 2**20)
    if not 0 < limit < 1 << 22:
        raise ValueError(f"a wait is limited to between 1 and {(1 << 42) // 10**6} ms, got {limit_ms}")
    return f"""@done bra DONE;
      add.u32 state, state, {_COUNT_UNIT};
      and.b32 low, state, {_COUNT_MASK};
      setp.ne.b32 again, low, {_COUNT_MASK};
      @again bra AGAIN;
      mov.u64 time, %globaltimer;
      shr.u64 time, time, 20;
      cvt.u32.u64 now, time;
      mul.lo.u32 now, now, {_TIME_UNIT};
      sub.u32 state, state, low;
      setp.lt.u32 first, state, {_TIME_UNIT};
      @first add.u32 state, state, now;
      sub.u32 now, now, state;
      add.u32 now, now, 1;
      setp.lt.u32 again, now, {limit * _TIME_UNIT};
      @again bra AGAIN;
      trap;
    DONE:"""

"""Polling global memory until other thread blocks have written it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jax.experimental.mosaic.gpu.utils import inline_ptx

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value


def poll_words(loads: Sequence[tuple[Pointer, int]], phase: Value, needed: Value) -> list[list[Value]]:
    """Words in global memory, loaded again and again until the low bit of each is the phase bit.

    The lanes of a warp, all of which take part, leave the loop together, by a vote: words of two blocks do not come at
    the same time. Where lanes may leave one by one, ptxas emits each shuffle and reduction after the loop twice, for
    lanes together and apart, or not at all for lanes apart; and a barrier of whole warps may then wait for ever.

    Without a limit: a limit here costs registers that some kernels do not have, and time on their critical path.
    `core.watchdog` bounds the wait from another warpgroup.

    Args:
      loads: pointers, and how many consecutive words to load from each, aligned as a whole: 1, 2 or 4.
      phase: the phase bit, 0 or 1.
      needed: 1 to poll, or 0 to load once and return whatever there is: where no block writes the words, or this one
        does not use them.
    """
    names, instructions, checks = itertools.count(), [], []
    first_pointer = sum(count for _, count in loads)
    for i, (_, count) in enumerate(loads):
        words = [f"${next(names)}" for _ in range(count)]
        vector, target = (f".v{count}", f"{{{', '.join(words)}}}") if count > 1 else ("", words[0])
        instructions.append(f"ld.relaxed.gpu.global{vector}.b32 {target}, [${first_pointer + i}];")
        checks += [f"lop3.b32 off, off, {word}, phase, 0xF6;" for word in words]  # off | (word ^ phase)
    phase_name, needed_name = (f"${first_pointer + len(loads) + i}" for i in range(2))
    code = f"""{{
      .reg .pred again;
      .reg .b32 off, phase, needed;
      mov.b32 phase, {phase_name};
      mov.b32 needed, {needed_name};
    AGAIN:
      {" ".join(instructions)}
      mov.b32 off, 0;
      {" ".join(checks)}
      and.b32 off, off, needed;
      setp.ne.b32 again, off, 0;
      vote.sync.any.pred again, again, -1;
      @again bra AGAIN;
    }}"""
    pointers = [pointer for pointer, _ in loads]
    types = (ptx.i32_type(),) * first_pointer
    words = iter(inline_ptx(code, *pointers, phase, needed, result_types=types, has_side_effects=True, convergent=True))
    return [[next(words) for _ in range(count)] for _, count in loads]


def store_in_phase(ptr: Pointer, word: Value, phase: Value) -> None:
    """Stores a word in global memory, its low bit replaced by the phase bit."""
    word = ptx.either_bits(ptx.bits_of(word, 0xFFFFFFFE), phase)
    inline_ptx("st.relaxed.gpu.global.b32 [$0], $1;", ptr, word, has_side_effects=True)

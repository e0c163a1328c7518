"""Numbers that pass between blocks and say themselves that they have come.

The lowest bit of every float32 that one block leaves for another is its mark: whether its layer is odd. A reader loads
it until it has the mark that it waits for, so that nothing comes between a number's way to memory and its way back: no
fence, no counter, no second load. A mark costs a unit in the last place at most, and half of them make NaN of the
infinities.

One bit is enough since nothing is overwritten before all its readers have read it: who writes anew has waited for
numbers that could not be there had they not. Whoever waits for something leaves something that all
wait for in the end; a block that has no rows in a phase leaves nothing there, and must not wait either.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jaxlib.mlir import ir
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx


def written_mark(layer: Int[Array, ""]) -> Int[Array, ""]:
    """Of what is written in a layer: 0 before the first."""
    return (jnp.int32(layer) + 1) & 1


def await_words(places: Sequence[tuple[ptx.Pointer, int]], mark: ir.Value, needed: ir.Value) -> list[list[ir.Value]]:
    """Words in global memory, loaded until all have the mark.

    Args:
      places: pointers, and how many words in a row are there, aligned as a whole: 1, 2 or 4.
      mark: 0 or 1.
      needed: 1, or 0 where nobody writes them or nobody wants them: then they are loaded once.
    """
    names, loads, checks = itertools.count(), [], []
    pointers = sum(count for _, count in places)
    for i, (_, count) in enumerate(places):
        words = [f"${next(names)}" for _ in range(count)]
        vector, tuple_ = (f".v{count}", f"{{{', '.join(words)}}}") if count > 1 else ("", words[0])
        loads.append(f"ld.relaxed.gpu.global{vector}.b32 {tuple_}, [${pointers + i}];")
        checks += [f"lop3.b32 off, off, {word}, mark, 0xF6;" for word in words]  # off | (word ^ mark)
    mark_name, needed_name = (f"${pointers + len(places) + i}" for i in range(2))
    code = f"""{{
      .reg .pred again;
      .reg .b32 off, mark, needed;
      mov.b32 mark, {mark_name};
      mov.b32 needed, {needed_name};
    AGAIN:
      {" ".join(loads)}
      mov.b32 off, 0;
      {" ".join(checks)}
      and.b32 off, off, needed;
      setp.ne.b32 again, off, 0;
      @again bra AGAIN;
    }}"""
    operands = [place for place, _ in places]
    types = (ptx.i32_type(),) * pointers
    words = iter(inline_ptx(code, *operands, mark, needed, result_types=types, has_side_effects=True))
    return [[next(words) for _ in range(count)] for _, count in places]


def store_marked(ptr: ptx.Pointer, word: ir.Value, mark: ir.Value) -> None:
    """Leaves a word in global memory with the mark in its lowest bit."""
    word = ptx.either_bits(ptx.bits_of(word, 0xFFFFFFFE), mark)
    inline_ptx("st.relaxed.gpu.global.b32 [$0], $1;", ptr, word, has_side_effects=True)


def with_mark(numbers: Float[Array, " n"], mark: Int[Array, ""] | int) -> Float[Array, " n"]:
    """What `store_marked` leaves of them, in jnp."""
    words = lax.bitcast_convert_type(numbers, jnp.int32)
    return lax.bitcast_convert_type((words & ~1) | mark, jnp.float32)


def checked(numbers: Float[Array, "..."], mark: Int[Array, ""]) -> Float[Array, "..."]:
    """What `await_words` finds, in jnp: NaN where it would wait for ever."""
    return jnp.where((lax.bitcast_convert_type(numbers, jnp.int32) & 1) == mark, numbers, jnp.nan)

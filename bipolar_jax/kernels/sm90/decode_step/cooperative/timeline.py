"""When each warpgroup of each block reached the steps of a phase: what `decode_layers(timed=True)` returns beside.

One thread of a warpgroup stores its multiprocessor's clock in a slot of its own, so that a reading costs some ten
instructions and nothing waits for it. Clocks of different multiprocessors begin apart: each block also reads its clock
together with the device's time when it enters and when it leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, pinned, repeat, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.ptx import Pointer
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import WARPGROUPS, LayersShape

# Steps of a phase, in order; the clock after each. Not all phases, and not all warpgroups, have all of them.
MARKS = (
    "prepared",  # loads of what no block computes are under way
    "released",  # the block has finished the phase before
    "arrived",  # what other blocks computed is here
    "encoded",  # the token, or the query, is in shared memory
    "multiplied",  # this warpgroup's share of weights, or of the cache, is read
    "met",  # that of the whole block
    "stored",  # the result is on its way to other blocks
)
WAITED = len(MARKS)  # the slot that counts clocks in which weights, or the cache, had not arrived
_SLOTS = WAITED + 1
ENTER, LEAVE = 0, 1


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Where the threads of a warpgroup store readings of the clock; nowhere, and no instructions, if `ref` is None.

    Attributes:
      shape: of the layers.
      names: of the phases, in order.
      ref: uint32 in global memory, as `timeline_type` says.
      warpgroup, block: of the threads.
      phase, layer: to which the readings belong.
    """

    shape: LayersShape
    names: tuple[str, ...]
    ref: Any = None
    warpgroup: Any = 0
    block: Any = 0
    phase: str = ""
    layer: Any = 0

    def of(self, phase: str, layer) -> Timeline:
        """That of a phase of a layer."""
        return dataclasses.replace(self, phase=phase, layer=layer)

    def mark(self, step: str) -> None:
        """Stores the clock of one of MARKS."""
        if self.ref is not None:
            _by_one_thread(self.ref, self._slot(MARKS.index(step)), _store_clock)

    def waiting(self) -> contextlib.AbstractContextManager:
        """Adds the clocks that pass within to the slot WAITED."""
        return contextlib.nullcontext() if self.ref is None else self._counted()

    @contextlib.contextmanager
    def _counted(self):
        slot = self._slot(WAITED)
        _by_one_thread(self.ref, slot, _subtract_clock)
        yield
        _by_one_thread(self.ref, slot, _add_clock)

    def enter(self) -> None:
        """Clears what `waiting` adds to; stores the clock and the device's time."""
        if self.ref is None:
            return

        def clear(layer):
            for name in self.names:
                _by_one_thread(self.ref, self.of(name, layer)._slot(WAITED), _store_zero)

        repeat(self.shape.num_layers, clear)
        _by_one_thread(self.ref, self._time(ENTER), _store_time)

    def leave(self) -> None:
        """Stores the clock and the device's time."""
        if self.ref is not None:
            _by_one_thread(self.ref, self._time(LEAVE), _store_time)

    def _slot(self, slot: int) -> Int[Array, ""]:
        of_warpgroup = (pinned(self.block) * WARPGROUPS + self.warpgroup) * self.shape.num_layers + self.layer
        return (of_warpgroup * len(self.names) + self.names.index(self.phase)) * _SLOTS + slot

    def _time(self, which: int) -> Int[Array, ""]:
        first = self.shape.blocks * WARPGROUPS * self.shape.num_layers * len(self.names) * _SLOTS
        return first + ((pinned(self.block) * WARPGROUPS + self.warpgroup) * 2 + which) * 2


def timeline_type(shape: LayersShape, phases: int) -> jax.ShapeDtypeStruct:
    """The flat array that `split_timeline` divides."""
    count = shape.blocks * WARPGROUPS * (shape.num_layers * phases * _SLOTS + 4)
    return jax.ShapeDtypeStruct((count,), jnp.uint32)


def split_timeline(timeline: Any, layers: int, phases: int) -> tuple[Any, Any]:
    """Clocks [blocks, warpgroups, layers, phases, slots], and [blocks, warpgroups, ENTER or LEAVE, 2]: clock and ns.

    All numbers are the low 32 bits; slots are those of MARKS, and WAITED.
    """
    times = timeline.size // (layers * phases * _SLOTS + 4) * 4
    clocks, ends = timeline[:-times], timeline[-times:]
    return clocks.reshape(-1, WARPGROUPS, layers, phases, _SLOTS), ends.reshape(-1, WARPGROUPS, 2, 2)


def _by_one_thread(ref, index: Int[Array, ""], store: Callable[[Pointer], None]) -> None:
    """store(pointer to ref[index]) by the first thread of the warpgroup. Interpret mode has no clock, so no twin."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, ref, index):
        with ptx.when(ptx.equal(thread_index(), 0)):
            store(ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), scalar_of(index), 4))

    inline(ref, jnp.int32(index))


def _store_clock(pointer: Pointer) -> None:
    ptx.store(pointer, [ptx.clock()])


def _store_zero(pointer: Pointer) -> None:
    ptx.store(pointer, [ptx.int32(0)])


def _store_time(pointer: Pointer) -> None:
    ptx.store(pointer, [ptx.clock()])
    ptx.store(ptx.advance(pointer, 4), [ptx.nanoseconds()])


def _subtract_clock(pointer: Pointer) -> None:
    ptx.add_global(pointer, ptx.times(ptx.clock(), -1))


def _add_clock(pointer: Pointer) -> None:
    ptx.add_global(pointer, ptx.clock())

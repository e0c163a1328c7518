"""The ring buffer of a warpgroup: tiles of keys and of values on their way from the cache to shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted
from bipolar_jax.kernels.sm90.decode_attention.config import AttentionPlan
from bipolar_jax.kernels.sm90.decode_attention.sequences import OwnSequences
from bipolar_jax.kernels.sm90.decode_attention.tiles import TILE_TRANSFORMS

KEYS, VALUES = 0, 1


def ring_scratch(plan: AttentionPlan, dtype: jnp.dtype) -> tuple[Any, Any]:
    """Scratch specifications: the slots of keys, or of values, of all warpgroups of a block; and their barriers."""
    slots = plan.warpgroups * plan.slots
    shape = (slots, plan.positions, plan.row_bytes // plan.itemsize)
    transforms = TILE_TRANSFORMS if plan.on_tensor_cores else ()
    return plgpu.SMEM(shape, dtype, transforms=transforms), plgpu.Barrier(num_barriers=slots)


@dataclasses.dataclass(frozen=True)
class CacheRing:
    """Tiles by turn; see `OwnSequences` for turns.

    Attributes:
      plan: of the kernel.
      own: the warpgroup's turns.
      layer, kv_head: where the cache is read.
      warpgroup: index of the warpgroup in its block.
      caches: keys and values in global memory, [layers, batch, kv_heads, capacity, elements].
      slots, arrived: of keys and of values, as `ring_scratch` has them.
    """

    plan: AttentionPlan
    own: OwnSequences
    layer: Int[Array, ""]
    kv_head: Int[Array, ""]
    warpgroup: Int[Array, ""] | int
    caches: tuple[Any, Any]
    slots: tuple[Any, Any]
    arrived: tuple[Any, Any]

    def start(self) -> None:
        """Starts the first loads."""
        for turn in range(self.plan.slots):
            for kind in (KEYS, VALUES):
                self._load(kind, turn + 0 * self.layer)

    def await_tile(self, kind: int, turn: Int[Array, ""]) -> Any:
        """The ref of a turn's tile, once it has arrived."""
        slot = self._slot(turn)
        plgpu.barrier_wait(self.arrived[kind].at[slot])
        return self.slots[kind].at[slot]

    def reload(self, kind: int, turn: Int[Array, ""]) -> None:
        """Starts the next load into the slot of a tile that the warpgroup has read."""
        if is_interpreted():
            # The copy waits for the warpgroup's reads, which suffices on the GPU; the race detector needs this.
            plgpu.commit_smem()
        self._load(kind, turn + self.plan.slots)

    def _slot(self, turn):
        return self.warpgroup * self.plan.slots + lax.rem(turn, self.plan.slots)

    def _load(self, kind: int, turn) -> None:
        @when(turn < self.own.all_turns)
        def _():
            index, slot = self.own.of_turn(turn), self._slot(turn)
            rows = pl.ds(self.own.first_loaded(index, turn), self.plan.positions)
            source = self.caches[kind].at[self.layer, self.own.sequence(index), self.kv_head, rows]
            # Without a swizzle [positions, elements] is contiguous, and one bulk copy of bytes does.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source, self.slots[kind].at[slot], self.arrived[kind].at[slot], oob_mode=in_bounds)

"""Positions of a cache that several devices share, one after the other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class CutPositions:
    """How consecutive devices of a mesh axis share the positions of a head, within `jax.shard_map`.

    Position p is slot p // parts of the device p % parts: texts of any length divide evenly, and what a device has of a
    text is a prefix of its slots.

    Attributes:
      axis: name of the mesh axis.
      devices: of that axis, a multiple of `parts`.
      parts: devices that share a head.
      capacity: positions of all of them.
    """

    axis: str
    devices: int
    parts: int
    capacity: int

    @property
    def slots(self) -> int:
        """Positions of one device; the last may lie beyond the capacity."""
        return -(-self.capacity // self.parts)

    @property
    def groups(self) -> list[list[int]]:
        """The devices that share a head, as `axis_index_groups`."""
        return [list(range(first, first + self.parts)) for first in range(0, self.devices, self.parts)]

    def index(self) -> Int[Array, ""]:
        """Of this device among those that share its head."""
        return jax.lax.axis_index(self.axis) % self.parts

    def positions(self) -> Int[Array, " slots"]:
        """Of this device's slots."""
        return jnp.arange(self.slots, dtype=jnp.int32) * self.parts + self.index()

    def slot(self, positions: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """This device's slot of each position; `slots`, which is none, if another device has it or none has."""
        is_here = (positions % self.parts == self.index()) & (positions < self.capacity)
        return jnp.where(is_here, positions // self.parts, self.slots)

    def taken(self, prompts: Array) -> Array:
        """This device's positions of prompts [batch, length, ...], zeros behind them: [batch, slots, ...]."""
        filler = [(0, 0)] * prompts.ndim
        filler[1] = (0, self.slots * self.parts - prompts.shape[1])
        rounds = jnp.pad(prompts, filler).reshape(prompts.shape[0], self.slots, self.parts, *prompts.shape[2:])
        return jax.lax.dynamic_index_in_dim(rounds, self.index(), axis=2, keepdims=False)

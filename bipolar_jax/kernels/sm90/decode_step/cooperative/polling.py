"""Self-flagging float32 values: the low bit is a phase bit, so readers poll the data itself.

The phase bit of a value is the parity of the layer that wrote it. A reader loads the value until the bit is the one it
expects. No fence, no counter and no second load adds to the latency between two blocks. The bit costs at most one unit
in the last place; in half of the phases it turns an infinity into NaN.

Why one bit is enough: a writer reuses a slot only after it has consumed values that depend on every reader of the old
one. Every block that polls in a phase contributes to a value that all blocks poll later, before the slot's next write.
A block that has no rows in a phase writes nothing there, so it must not poll either (`needed`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Awaited(NamedTuple):
    """What a reader polls for.

    Attributes:
      phase: the expected phase bit, int32.
      needed: whether to poll; if not, the values are loaded once and mean nothing.
    """

    phase: Int[Array, ""]
    needed: Bool[Array, ""] | int


def phase_bit(layer: Int[Array, ""]) -> Int[Array, ""]:
    """The phase bit of what a layer writes; 0 for what is written before the first layer."""
    return (jnp.int32(layer) + 1) & 1


def in_phase(values: Float[Array, " n"], phase: Int[Array, ""] | int) -> Float[Array, " n"]:
    """The values with their low bits replaced: the twin of `core.polling.store_in_phase`."""
    words = lax.bitcast_convert_type(values, jnp.int32)
    return lax.bitcast_convert_type((words & ~1) | phase, jnp.float32)


def nan_unless_in_phase(values: Float[Array, "..."], phase: Int[Array, ""]) -> Float[Array, "..."]:
    """The twin of `core.polling.poll_words`: NaN where that would never return."""
    return jnp.where((lax.bitcast_convert_type(values, jnp.int32) & 1) == phase, values, jnp.nan)

"""Rotates pairs of a head in a kernel's epilogue, by the fixed-point tables of `semantics.rotation`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics.rotation import STEPS_PER_UNIT


def rotated(
    halves: list[Float[Array, "rows half"]], tables: list[Float[Array, "rows half"]]
) -> list[Float[Array, "rows half"]]:
    """Pairs (d, d + half) of every row by the angle of its position.

    Args:
      halves: of a head, float32.
      tables: what of `fixed_point_tables` belongs to these rows, their bits as numbers of a 16-bit float dtype.
    """
    first, second = halves
    cos, sin = (lax.bitcast_convert_type(table, jnp.int16).astype(jnp.float32) for table in tables)
    # The step of both is a power of two: it rounds nothing, wherever it is multiplied with.
    first, second = first * (1 / STEPS_PER_UNIT), second * (1 / STEPS_PER_UNIT)
    return [first * cos - second * sin, second * cos + first * sin]

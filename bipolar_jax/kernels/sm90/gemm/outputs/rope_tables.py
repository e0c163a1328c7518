"""Rotary embeddings in a kernel's epilogue, by cosines and sines that come as 16-bit integers.

Half the bytes of float32, which counts: a tile of 128 rows and a head of 128 numbers loads 128 KB to be multiplied at
K = 4096 and one bit, and its cosines and sines are 64 KB in float32. Multiples of 2^-14 are within 2^-15 of any number
of at most 2, an eighth of what float16 rounds numbers near 1 by, and 1/64 of what bfloat16 rounds the result by.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int16

_STEPS = 2**14  # of the integers, to 1
LARGEST_AMPLITUDE = 1.999  # of what is rotated, over what it was; more would not fit

FixedPointTables = tuple[Int16[Array, "rows half"], Int16[Array, "rows half"]]


def fixed_point_tables(
    tables: tuple[Float[Array, "1 length half"], Float[Array, "1 length half"]], row_unit: int
) -> FixedPointTables:
    """Cosines and sines of at most LARGEST_AMPLITUDE as multiples of 2^-14, and zeros to whole units of rows.

    Raises:
      ValueError: tables of several sequences, each with positions of its own.
    """
    sequences, length, _ = tables[0].shape
    if sequences != 1:
        raise ValueError(f"all prompts have the same positions, got tables of {sequences}")
    rounded = (jnp.round(table[0] * _STEPS).astype(jnp.int16) for table in tables)
    return tuple(jnp.pad(table, ((0, -length % row_unit), (0, 0))) for table in rounded)


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
    first, second = first * (1 / _STEPS), second * (1 / _STEPS)
    return [first * cos - second * sin, second * cos + first * sin]

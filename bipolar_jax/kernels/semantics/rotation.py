"""Cosines and sines of rotary embeddings as 16-bit fixed-point numbers.

A kernel that rotates heads in its epilogue loads a cosine and a sine for every pair of numbers; 16 bits are half the
bytes of float32. Multiples of 2^-14 are within 2^-15 of any number of magnitude below 2: an eighth of the rounding
step of float16 near 1, 1/64 of that of bfloat16.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int16

STEPS_PER_UNIT = 2**14
# Of cosines and sines times a model's attention factor: beyond it int16 overflows.
LARGEST_AMPLITUDE = 1.999

FixedPointTables = tuple[Int16[Array, "rows half"], Int16[Array, "rows half"]]


def fixed_point_tables(
    tables: tuple[Float[Array, "1 length half"], Float[Array, "1 length half"]], row_unit: int
) -> FixedPointTables:
    """Cosines and sines as integer multiples of 2^-14, rows padded with zeros to a multiple of `row_unit`.

    Args:
      tables: float32, of magnitude at most LARGEST_AMPLITUDE.
      row_unit: positions a tile of the kernel covers.

    Raises:
      ValueError: tables of several sequences; all prompts share one table.
    """
    sequences, length, _ = tables[0].shape
    if sequences != 1:
        raise ValueError(f"all prompts have the same positions, got tables of {sequences}")
    rounded = (jnp.round(table[0] * STEPS_PER_UNIT).astype(jnp.int16) for table in tables)
    return tuple(jnp.pad(table, ((0, -length % row_unit), (0, 0))) for table in rounded)

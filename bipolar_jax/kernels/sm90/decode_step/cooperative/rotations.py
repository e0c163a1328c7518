"""Rotations by Hadamard matrices: of the input of down, and of the new token's query and key.

The stages are those of `kernels.semantics.hadamard`, in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.sm90.arithmetic.butterflies import rotate_vectors
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import VECTOR, as_vector, only_word, repeat, thread_index
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import Awaited
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import poll_vectors, store_vector

_VECTOR_TYPE = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR)


def _rotate_twin(scratch, vectors, size):
    numbers = jnp.concatenate(vectors)
    return list(Hadamard((size,), numbers.size // size)(numbers).reshape(-1, WARPGROUP))


@with_twin(_rotate_twin)
def rotate(scratch: Any, vectors: Sequence[Float[Array, "128"]], size: int) -> list[Float[Array, "128"]]:
    """Vectors of which every block is rotated; all threads of the warpgroup take part, and meet once at most.

    Args:
      scratch: shared memory, float32 [rows, 128], see `butterflies.rotate_vectors`.
      vectors: one element a thread; of a vector of 64 elements these are two copies.
      size: numbers of a block, a power of two; blocks of 256 are pairs of vectors.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[VECTOR] * len(vectors)), return_type=tuple(_VECTOR_TYPE for _ in vectors)
    )
    def inline(_, scratch, *vectors):
        numbers = [ptx.as_float(only_word(vector)) for vector in vectors]
        rotated = rotate_vectors(ptx.pointer(scratch, ptx.SHARED), numbers, size, thread_index())
        return tuple(as_vector(x, jnp.float32) for x in rotated)

    return list(inline(scratch, *vectors))


def clear_rotated(shape: LayersShape, block, rotated) -> None:
    """Gives what this block will write phase bit 0, which no block polls for in the first layer; of one text."""
    zeros = plgpu.layout_cast(jnp.zeros(WARPGROUP, jnp.float32), VECTOR)

    def clear(start, scratch):
        del scratch
        for vector in range(shape.rotated_unit.vectors):
            store_vector(rotated, zeros, start + vector * WARPGROUP, shape.rotated_unit.size, 0)

    _for_units(shape, block, clear)


def rotate_input_of_down(shape: LayersShape, block, source, rotated, phase, scratch, first_row) -> None:
    """Rotates a block's share of what gate and up have made, for one text.

    Args:
      shape: has a rotation.
      block: of the grid.
      source: flat float32 in global memory, which other blocks write.
      rotated: the same numbers, rotated.
      phase: the bit that is awaited, and written.
      scratch: shared memory, float32 [rows, 128], of which this warpgroup uses two units' rows in turn.
      first_row: of these.
    """
    unit = shape.rotated_unit

    def rotate_unit(start, turn):
        starts = [start + vector * WARPGROUP for vector in range(unit.vectors)]
        vectors = poll_vectors(source, starts, [0] * unit.vectors, Awaited(phase, 1), unit.size)
        rows = scratch.at[pl.ds(first_row + lax.rem(turn, 2) * unit.vectors, unit.vectors)]
        for at, vector in zip(starts, rotate(rows, vectors, shape.activation.rotation.block), strict=True):
            store_vector(rotated, vector, at, unit.size, phase)

    _for_units(shape, block, rotate_unit)


def _for_units(shape: LayersShape, block, do: Callable[[Any, Any], None]) -> None:
    """Calls do(first element, turn) for each unit of a block."""
    unit = shape.rotated_unit
    units = shape.ffn // (unit.vectors * unit.size)

    def once(turn):
        index = block + turn * shape.blocks

        @pl.when(index < units)
        def _():
            do(index * (unit.vectors * unit.size), turn)

    repeat(-(-units // shape.blocks), once)

"""Rotations by Hadamard matrices: of the input of down, and of the new token's query and key.

The stages are those of `kernels.semantics.hadamard`, in that order. The input of down passes between thread blocks: the
block that makes the numbers computes the first stages, as far as it has the numbers (`LayersShape.rotated_early`), and
every block the rest of them for the whole token, if there are more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics.hadamard import Hadamard, butterflies
from bipolar_jax.kernels.sm90.arithmetic.butterflies import rotate_numbers, rotate_vectors, stages_of_vectors
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    VECTOR,
    as_k_slice,
    as_vector,
    lane_and_warp,
    numbers_of,
    only_word,
    thread_index,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE

_K_SLICE_TYPE = plgpu.ShapeDtypeStruct((K_SLICE,), jnp.float32, layout=K_SLICE_LAYOUT)
_VECTOR_TYPE = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR)


def _begin_rotation_twin(scratch, values, block, early):
    del scratch
    numbers = butterflies(values.reshape(-1, early, 1)).reshape(-1)
    return numbers * block**-0.5 if early == block else numbers


@with_twin(_begin_rotation_twin)
def begin_rotation(scratch: Any, values: Float[Array, "128"], block: int, early: int) -> Float[Array, "128"]:
    """The first stages of a vector's rotation, of distances below `early`; and the factor if there are no others.

    All threads of the warpgroup take part, and meet once if `early` exceeds a warp.

    Args:
      scratch: shared memory, float32 [128], see `butterflies.stages_of_vectors`.
      values: one element a thread.
      block: numbers of a block of the rotation, a power of two.
      early: likewise, at most 128.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR), return_type=_VECTOR_TYPE)
    def inline(_, scratch, values):
        numbers = [ptx.as_float(only_word(values))]
        (number,) = stages_of_vectors(ptx.pointer(scratch, ptx.SHARED), numbers, early, thread_index())
        return as_vector(ptx.multiply(number, ptx.float32(block**-0.5)) if early == block else number, jnp.float32)

    return inline(scratch, values)


def _end_rotation_twin(values, block, early):
    return butterflies(values.reshape(-1, block // early, early)).reshape(-1) * block**-0.5


@with_twin(_end_rotation_twin)
def end_rotation(values: Float[Array, "1024"], block: int, early: int) -> Float[Array, "1024"]:
    """What is left of the rotation of a K slice after `begin_rotation`, with the factor.

    Args:
      values: blocks of consecutive numbers.
      block, early: as of `begin_rotation`; a block is at most 256, the numbers of a warp.
    """

    @plgpu.inline_mgpu(arg_types=(K_SLICE_LAYOUT,), return_type=_K_SLICE_TYPE)
    def inline(_, values):
        lane, _ = lane_and_warp()
        return as_k_slice(rotate_numbers(numbers_of(values), block, lane, first=early))

    return inline(values)


def _rotate_heads_twin(scratch, heads, size):
    return [Hadamard((size,), WARPGROUP // size)(head) for head in heads]


@with_twin(_rotate_heads_twin)
def rotate_heads(scratch: Any, heads: Sequence[Float[Array, "128"]], size: int) -> list[Float[Array, "128"]]:
    """Heads, each rotated as one block; all threads of the warpgroup take part, and meet once.

    Args:
      scratch: shared memory, float32 [rows, 128], see `butterflies.rotate_vectors`.
      heads: vectors, one element a thread; of a head of 64 these are two copies.
      size: 64 or 128, numbers of a head.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[VECTOR] * len(heads)), return_type=tuple(_VECTOR_TYPE for _ in heads)
    )
    def inline(_, scratch, *heads):
        numbers = [ptx.as_float(only_word(head)) for head in heads]
        rotated = rotate_vectors(ptx.pointer(scratch, ptx.SHARED), numbers, size, thread_index())
        return tuple(as_vector(x, jnp.float32) for x in rotated)

    return list(inline(scratch, *heads))

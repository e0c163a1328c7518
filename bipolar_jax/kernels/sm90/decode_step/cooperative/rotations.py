"""Rotations by Hadamard matrices: of the token in front of a product, and of the new token's query and key.

The stages are those of `kernels.semantics.hadamard`, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.sm90.arithmetic.butterflies import rotate_numbers, rotate_vectors
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


def _rotate_slice_twin(values, block):
    return Hadamard((block,), K_SLICE // block)(values)


@with_twin(_rotate_slice_twin)
def rotate_slice(values: Float[Array, "1024"], block: int) -> Float[Array, "1024"]:
    """A K slice, of which every block is rotated: a power of two of numbers, at most those of a warp."""

    @plgpu.inline_mgpu(arg_types=(K_SLICE_LAYOUT,), return_type=_K_SLICE_TYPE)
    def inline(_, values):
        lane, _ = lane_and_warp()
        return as_k_slice(rotate_numbers(numbers_of(values), block, lane))

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

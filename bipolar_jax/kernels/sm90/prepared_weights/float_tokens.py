"""Float tokens in the order in which threads multiply them with prepared weights.

A register of four codes becomes two pairs of floats (`floats.FloatExpansion`), and an instruction m16n8k16 takes the
registers of one half h of a step: its first k, 2 t and 2 t + 1, are the first pair of lane t, its last ones the second.
So a step of a token, 32 numbers, lies in memory as [half, pair, lane, 2], which `ldmatrix` hands to the lanes, or as
[lane, half, pair, 2], from which a lane loads its eight numbers at once. The position 16 h + 4 t + 2 e + p of number e
of pair p is that of the weight's byte (`packing.fields`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from bipolar_jax.packing.fields import STAGE

_STEP = 32
TOKEN_WORDS = STAGE // 2  # of a stage


def token_words(x: Float[Array, "m k"], natural_order: bool) -> UInt32[Array, "m stages words"]:
    """Tokens [half, pair, lane, 2] by step, two numbers a word, zeros beyond K.

    Args:
      x: bfloat16 or float16.
      natural_order: whether positions are elements, see `packing.fields`.
    """
    m, k = x.shape
    steps = jnp.pad(x, ((0, 0), (0, -k % STAGE))).reshape(m, -1, _STEP)
    ordered = by_pair(positions_of_elements(steps, natural_order))
    return jax.lax.bitcast_convert_type(ordered.reshape(m, -1, TOKEN_WORDS, 2), jnp.uint32)


def positions_of_elements(steps: Shaped[Array, "*rows 32"], natural_order: bool) -> Shaped[Array, "*rows 32"]:
    """Elements of steps in the order of their positions: position 4 j + i is element 8 i + j, or itself."""
    if natural_order:
        return steps
    return steps.reshape(*steps.shape[:-1], 4, 8).swapaxes(-1, -2).reshape(steps.shape)


def by_pair(positions: Shaped[Array, "*rows 32"]) -> Shaped[Array, "*rows 32"]:
    """Positions of steps in the order [half, pair, lane, 2]."""
    rows = positions.shape[:-1]
    return jnp.moveaxis(positions.reshape(*rows, 2, 4, 2, 2), -1, -3).reshape(positions.shape)


def positions_by_pair(ordered: Shaped[Array, "*rows 32"]) -> Shaped[Array, "*rows 32"]:
    """The inverse of `by_pair`."""
    rows = ordered.shape[:-1]
    return jnp.moveaxis(ordered.reshape(*rows, 2, 2, 4, 2), -3, -1).reshape(ordered.shape)

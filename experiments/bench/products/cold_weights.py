"""Products whose weights come from memory: as many copies in turn as the L2 cache cannot hold.

With many tokens the weights of a product are read once and used often, and where they come from
matters little. With few it is all there is to measure, and a model's weights are never in the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bipolar_jax.kernels.sm90.backend.planning import MOST_DECODE_TOKENS
from experiments.bench.products.candidates import Call
from experiments.bench.products.shapes import Shape

_CACHE_BYTES = 50 * 2**20  # of an H100 or H200
_MOST_COPIES = 12  # each is compiled


def few_tokens(shape: Shape) -> bool:
    """Whether a product is bound by reading its weights."""
    return shape.m <= MOST_DECODE_TOKENS


def copies_of(weights) -> int:
    """Copies that are at least twice what the cache holds."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    return max(2, min(_MOST_COPIES, -(-2 * _CACHE_BYTES // nbytes)))


def with_cold_weights(call: Call, position: int) -> tuple[Call, int]:
    """The function applied to several copies of its operands; of all, or XLA would do once what copies have in common.

    Args:
      call: a function and its operands.
      position: of the weights among them.

    Returns:
      A function that gives the list of products, with its operands; and how many they are.
    """
    function, args = call
    count = copies_of(args[position])
    once = jax.jit(function)  # traced and lowered once

    def products(*several):
        return [once(*args) for args in several]

    return (products, tuple(jax.tree.map(jnp.copy, args) for _ in range(count))), count

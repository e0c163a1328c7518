"""Products of few tokens with weights from memory: calls rotate through more copies than the L2 cache holds.

With few tokens a product is bound by reading its weights. Repeated on one copy it would read them from the L2 cache,
which a whole model's weights exceed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from experiments.bench.products.product import Call
from experiments.bench.products.shapes import Shape

L2_BYTES = 50 * 2**20  # H100 and H200
_MOST_COPIES = 12  # compile time grows with each


def few_tokens(shape: Shape) -> bool:
    """Whether a product has so few tokens that reading its weights bounds it."""
    return shape.m <= FEW_TOKENS_LIMIT


def copies_of(weights, least_bytes: int = 2 * L2_BYTES) -> int:
    """Number of copies that together have so many bytes, from 2 to 12."""
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    return max(2, min(_MOST_COPIES, -(-least_bytes // nbytes)))


def with_cold_weights(call: Call, position: int, least_bytes: int = 2 * L2_BYTES) -> tuple[Call, int]:
    """The function applied to several copies of its operands.

    All operands are copied, not only the weights: XLA would otherwise share work between the calls.

    Args:
      call: a function and its operands.
      position: index of the weights among the operands.
      least_bytes: of all copies of the weights together, if 12 are enough.

    Returns:
      A call that returns the list of products, and their number.
    """
    function, args = call
    count = copies_of(args[position], least_bytes)
    jitted = jax.jit(function)  # traced and lowered once for all copies

    def products(*copies):
        return [jitted(*args) for args in copies]

    return (products, tuple(jax.tree.map(jnp.copy, args) for _ in range(count))), count

"""Stacks of experts in calibration: second moments of the tokens that reach each expert, and what these tokens count.

An expert's output is multiplied with the router's weight, so that the square of an error counts the weight's square.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.compress.hessians import SecondMoments, dequantized_tokens, stream_weights
from bipolar_jax.compress.site_inputs import ExpertInputs
from bipolar_jax.format import BipolarFormat


def empty_expert_moments(count: int, k: int) -> SecondMoments:
    """Sums over no tokens, for each of so many experts."""
    return SecondMoments(jnp.zeros((count, k, k), jnp.float32), jnp.zeros(count, jnp.float32))


def add_expert_inputs(
    moments: SecondMoments,
    inputs: ExpertInputs,
    a_bits: int | BipolarFormat | None,
    stream: Float[Array, "batch length hidden"] | None,
) -> SecondMoments:
    """The sums of each expert with the tokens of a batch that reach it; arguments as of `SecondMoments.add`."""

    def step(sums, block):
        rows, weights, expert = block
        numbers = dequantized_tokens(rows, a_bits)
        products = jnp.matmul((numbers * weights[:, None]).T, numbers, precision=jax.lax.Precision.HIGHEST)
        added = SecondMoments(sums.products.at[expert].add(products), sums.weight.at[expert].add(weights.sum()))
        return added, None

    weights = row_weights(inputs, None if stream is None else stream_weights(stream.reshape(-1, stream.shape[-1])))
    return jax.lax.scan(step, moments, (inputs.rows, weights, inputs.blocks.experts))[0]


def row_weights(inputs: ExpertInputs, of_tokens: Float[Array, " tokens"] | None) -> Float[Array, "blocks rows"]:
    """How much the squared error of each row counts: 0 in empty rows."""
    weights = jnp.square(inputs.blocks.weights.astype(jnp.float32))
    if of_tokens is None:
        return weights
    return weights * jnp.take(of_tokens, inputs.blocks.sources, mode="fill", fill_value=0)


def expert_hessians(moments: SecondMoments) -> Float[Array, "experts k k"]:
    """`SecondMoments.hessian` of each expert; the identity of one that no token has reached."""
    hessians = jax.vmap(SecondMoments.hessian)(moments)
    identity = jnp.eye(hessians.shape[-1], dtype=hessians.dtype)
    return jnp.where(moments.weight[:, None, None] > 0, hessians, identity)

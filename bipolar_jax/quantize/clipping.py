"""Activations clipped before they are quantized, so that few bits are not spent on a token's largest numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.quantize.fixed_point import fixed_point_mean


def check_clip(ratio: float | None) -> None:
    """Raises ValueError unless `ratio` is None or a number above 0."""
    if ratio is not None and not 0 < ratio < float("inf"):
        raise ValueError(f"clip_activations must be None or a number above 0, got {ratio!r}")


@functools.partial(jax.jit, static_argnums=1)
def clip_tokens(x: Float[Array, "*batch k"], ratio: float) -> Float[Array, "*batch k"]:
    """Bounds every number by `ratio` times the mean magnitude of its token.

    Quantizers of activations span from a token's smallest number to its largest. With a ratio of 1 one bit keeps the
    sign of each number and the mean magnitude of all, which is the closest that it can come to them
    (XNOR-Net, arXiv 1603.05279, section 3.1); the largest of some hundred normal numbers is 3.5 times that. The least
    squared error of 2 bits, for normal numbers on a grid with a zero, is near a ratio of 2.

    The gradient is that of clipping at a bound that stays where it is: 1 up to the bound, 0 beyond (PACT, arXiv
    1805.06085, section 3; for one bit, the hard tanh of arXiv 1602.02830, section 1.3). What is beyond it does not
    change with its number, and training that is told otherwise falls far behind, at one bit most of all.

    Args:
      x: any float dtype, in which the bound is rounded.
      ratio: above 0.
    """
    # Compiled by itself, so that it rounds alike in training and in inference.
    rows = jax.lax.optimization_barrier(jax.lax.stop_gradient(x))
    bound = (ratio * fixed_point_mean(jnp.abs(rows))[..., None]).astype(x.dtype)
    return _clipped(x, jax.lax.optimization_barrier(jnp.clip(rows, -bound, bound)), jnp.abs(rows) <= bound)


@jax.custom_jvp
def _clipped(x, value, inside):
    return value


@_clipped.defjvp
def _(primals, tangents):
    _, value, inside = primals
    return value, jnp.where(inside, tangents[0], 0)

"""Training of small NNX models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float


def train(model: nnx.Module, x: Float[Array, "*rows k"], y: Float[Array, "*rows n"], steps: int) -> list[float]:
    """Fits model(x) to y, in place; returns the mean squared error before every step."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes
            optimizer.update(model, gradient)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]

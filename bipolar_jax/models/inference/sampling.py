"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

_SMALLEST_TEMPERATURE = 1e-6  # below it float32 logits overflow when divided


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits, at least 1e-6; 0 is greedy: it takes the largest logit, and needs no key.
      top_k: keeps the k most likely tokens, and those as likely as the k-th; None keeps all.
      top_p: keeps the fewest of these whose probabilities add up to it (Holtzman et al. 2019, arXiv 1904.09751); 1
        keeps all.

    Raises:
      ValueError: values outside these ranges.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not _SMALLEST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {_SMALLEST_TEMPERATURE} and finite, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, key: PRNGKeyArray | None = None
) -> Int[Array, " batch"]:
    """One token id for each row, int32.

    Raises:
      ValueError: temperature above 0 without a key.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"temperature={sampling.temperature} draws at random: pass a PRNG key, or temperature=0")
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = jnp.where(_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "batch vocab"], top_p: float) -> Array:
    """True for the most likely tokens, up to and including the one at which their probability reaches top_p."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)

"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

_SMALLEST_DIVISOR = 1e-6  # below it float32 logits overflow when divided
_ALL_TOKENS = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits, at least 1e-6; 0 is greedy: it takes the largest logit, and needs no key.
      top_k: keeps the k most likely tokens, and those as likely as the k-th; None keeps all.
      top_p: keeps the fewest of these whose probabilities add up to it (Holtzman et al. 2019, arXiv 1904.09751); 1
        keeps all.
      repetition_penalty: divides positive logits of tokens that the text has, prompt included, and multiplies negative
        ones (Keskar et al. 2019, arXiv 1909.05858, as in transformers), from 1e-6 to 1e6; 1 changes nothing. Applied
        first.

    Raises:
      ValueError: values outside these ranges.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.temperature != 0 and not _SMALLEST_DIVISOR <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {_SMALLEST_DIVISOR} and finite, got {self.temperature}"
            )
        is_integer = isinstance(self.top_k, int | np.integer) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (is_integer and self.top_k >= 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None, got {self.top_k!r:.40}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not _SMALLEST_DIVISOR <= self.repetition_penalty <= 1 / _SMALLEST_DIVISOR:
            raise ValueError(
                f"repetition_penalty must be from {_SMALLEST_DIVISOR} to {1 / _SMALLEST_DIVISOR:g}, got "
                f"{self.repetition_penalty}: 1 changes nothing"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether the text so far changes the logits."""
        return self.repetition_penalty != 1

    def values(self) -> SamplingValues:
        """The settings as operands of a compiled program, which serves all values of them."""
        top_k = _ALL_TOKENS if self.top_k is None else min(self.top_k, _ALL_TOKENS)
        return SamplingValues(
            np.float32(self.temperature), np.int32(top_k), np.float32(self.top_p), np.float32(self.repetition_penalty)
        )


def _number(name: str, value: Any) -> float:
    """A float, so that settings can be hashed and compared. Raises ValueError for what is no one number."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be a number, got {value!r:.40}")


def one_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """A typed key, of one of either kind. Raises ValueError for anything else."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key must be a PRNG key such as jax.random.key(0), got {key!r:.40}")
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise ValueError(f"key must be one PRNG key, got an array of {key.shape}: it is split here")
    return key


class SamplingValues(NamedTuple):
    """The fields of `Sampling` as scalars, traced or not; top_k of all tokens is the largest int32."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, key: PRNGKeyArray | None = None
) -> Int[Array, " batch"]:
    """One token id for each row, int32; `repetition_penalty` needs the text, see `penalized`, and is not applied.

    Args:
      logits: scores of every token.
      sampling: how to choose.
      key: PRNG key of either kind (`jax.random.key`, `jax.random.PRNGKey`).

    Raises:
      ValueError: temperature above 0 without a key.
    """
    if sampling.greedy:
        return likeliest(logits)
    if key is None:
        raise ValueError(f"temperature={sampling.temperature} draws at random: pass a PRNG key, or temperature=0")
    return draw(logits, sampling.values(), key)


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The largest logit of each row, int32; of ties the first."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def draw(logits: Float[Array, "batch vocab"], values: SamplingValues, key: PRNGKeyArray) -> Int[Array, " batch"]:
    """One token id drawn for each row, int32; the settings may be traced, with a temperature above 0."""
    logits = logits.astype(jnp.float32) / values.temperature
    excludes = (values.top_k < logits.shape[-1]) | (values.top_p < 1)
    # Sorting the vocabulary costs more than the draw, and most texts are drawn from all of it.
    logits = jax.lax.cond(excludes, _without_excluded, lambda logits, _: logits, logits, values)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def penalized(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], values: SamplingValues
) -> Float[Array, "batch vocab"]:
    """Logits with the repetition penalty on the tokens that were `seen`; float32."""
    logits = logits.astype(jnp.float32)
    penalty = values.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def log_probabilities(logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """Natural logarithm of each token's probability; float32."""
    every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(every, tokens[:, None], axis=-1)[:, 0]


def _without_excluded(logits: Float[Array, "batch vocab"], values: SamplingValues) -> Float[Array, "batch vocab"]:
    """-inf for tokens outside the top k, and among those left outside the nucleus."""
    order = jnp.argsort(-logits, axis=-1)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    last = jnp.minimum(values.top_k, logits.shape[-1]) - 1
    kth = jax.lax.dynamic_slice_in_dim(ordered, last, 1, axis=-1)
    kept = ordered >= kth
    probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounded sums reach 1 before the last token, so 1 is asked for by itself.
    kept &= (before < values.top_p) | (values.top_p >= 1)
    return jnp.where(jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1), logits, -jnp.inf)

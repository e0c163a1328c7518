"""Attention with linear biases, in place of position embeddings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """How much each head minds distance, float64.

    Source: Press et al. 2021, arXiv 2108.12409, section 3: 2^(-8/n), 2^(-16/n) ... for n heads,
    a power of two; other counts, by the authors' code, take all slopes of the power of two
    below and then every other one of the power of two above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    between = _geometric_slopes(2 * below)[::2]
    return np.concatenate([_geometric_slopes(below), between[: num_heads - below]])


def _geometric_slopes(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


def alibi_bias(num_heads: int, num_keys: int) -> Float[Array, "1 heads 1 keys"]:
    """What ALiBi adds to the scores of every query, float32.

    The paper's -slope * (i - j) for query i and key j and this slope * j differ by what is
    the same for all keys of a query, which softmax ignores; so one row serves every query.
    """
    return jnp.asarray(np.outer(alibi_slopes(num_heads), np.arange(num_keys)), jnp.float32)[None, :, None, :]

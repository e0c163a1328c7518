"""ALiBi: linear biases on attention scores, in place of position embeddings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """The slope of each head, float64.

    Source: Press et al. 2021, arXiv 2108.12409, section 3: 2^(-8/n), 2^(-16/n) ... for n heads if n is a power of two.
    For other counts the authors' code takes all slopes of the power of two below, then every second one of the power
    of two above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    between = _geometric_slopes(2 * below)[::2]
    return np.concatenate([_geometric_slopes(below), between[: num_heads - below]])


def _geometric_slopes(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


def alibi_bias(num_heads: int, num_keys: int) -> Float[Array, "1 heads 1 keys"]:
    """ALiBi's biases on the scores, float32: slope * j for key j, one row for all queries.

    The paper's bias of query i and key j is -slope * (i - j). The difference, slope * i, is the same for all keys of a
    query, and softmax ignores it.
    """
    return jnp.asarray(np.outer(alibi_slopes(num_heads), np.arange(num_keys)), jnp.float32)[None, :, None, :]

"""Groups: runs of consecutive elements of the contracted axis that share one scale; blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

# A block of rows has about this many numbers, so that temporaries stay small beside large arrays.
_BLOCK_NUMBERS = 1 << 22


def num_groups(k: int, group_size: int | None) -> int:
    """Number of groups along a contracted axis of size k; `group_size` None is one group of size k."""
    return 1 if group_size is None else -(-k // group_size)


def check_group_size(k: int, group_size: int | None) -> None:
    """Raises ValueError unless `group_size` is None or an integer from 1 to k."""
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int | np.integer) or not 1 <= group_size <= k:
        raise ValueError(
            f"group_size must be an integer from 1 to the contracted size {k}, got {group_size!r}; "
            "None shares one scale over the whole axis"
        )


def split_groups(x: Shaped[Array, "*rows k"], group_size: int | None) -> Shaped[Array, "*rows groups size"]:
    """Splits the last axis into groups; pads the last group with zeros."""
    k = x.shape[-1]
    groups = num_groups(k, group_size)
    size = k if group_size is None else group_size
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - k)])
    return padded.reshape(*x.shape[:-1], groups, size)


def join_groups(x: Shaped[Array, "*rows groups size"], k: int) -> Shaped[Array, "*rows k"]:
    """Inverse of `split_groups`: joins the groups and drops the padding."""
    return x.reshape(*x.shape[:-2], -1)[..., :k]


def valid_mask(k: int, group_size: int | None) -> Bool[np.ndarray, "groups size"]:
    """True for elements, False for the padding that `split_groups` adds."""
    groups = num_groups(k, group_size)
    size = k if group_size is None else group_size
    return (np.arange(groups * size) < k).reshape(groups, size)


def group_lengths(k: int, group_size: int | None) -> np.ndarray:
    """Number of elements of every group without padding, int32 [groups]."""
    return valid_mask(k, group_size).sum(axis=-1).astype(np.int32)


def along_last(array: Shaped[Array, "*last"] | Shaped[np.ndarray, "*last"], ndim: int) -> Shaped[Array, "..."]:
    """The array with axes of size 1 before its own, so that it broadcasts over the first axes of one of `ndim` axes.

    JAX does so itself, but not if `jax_numpy_rank_promotion` is "raise".
    """
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def spread_groups(per_group: Shaped[Array, "*rows groups"], k: int, group_size: int | None) -> Shaped[Array, "*rows k"]:
    """Repeats the number of each group for every element of that group."""
    size = k if group_size is None else group_size
    return jnp.repeat(per_group, size, axis=-1)[..., :k]


def in_blocks(function: Callable[[Array], Any], rows: Shaped[Array, "rows k"]) -> Any:
    """function(rows), arrays [rows, ...], computed for one block of rows after the other; zeros pad the last block."""
    count, k = rows.shape
    blocks = min(count, -(-count * k // _BLOCK_NUMBERS))
    if blocks == 1:
        return function(rows)
    size = -(-count // blocks)
    padded = jnp.pad(rows, ((0, blocks * size - count), (0, 0)))
    results = jax.lax.map(function, padded.reshape(blocks, size, k))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], results)

"""Runs of the contracted axis that share one scale."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped


def num_groups(k: int, group_size: int | None) -> int:
    """Groups along a contracted axis of size k; None is one group over all of it."""
    return 1 if group_size is None else -(-k // group_size)


def check_group_size(k: int, group_size: int | None) -> None:
    """Raises ValueError unless 1 <= group_size <= k, or None."""
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int | np.integer) or not 1 <= group_size <= k:
        raise ValueError(
            f"group_size must be an integer from 1 to the contracted size {k}, got {group_size!r}; "
            "None shares one scale over the whole axis"
        )


def split_groups(x: Shaped[Array, "*rows k"], group_size: int | None) -> Shaped[Array, "*rows groups size"]:
    """Splits the last axis into groups, the last one filled up with zeros."""
    k = x.shape[-1]
    groups = num_groups(k, group_size)
    size = k if group_size is None else group_size
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - k)])
    return filled.reshape(*x.shape[:-1], groups, size)


def join_groups(x: Shaped[Array, "*rows groups size"], k: int) -> Shaped[Array, "*rows k"]:
    """Inverse of `split_groups`: drops what filled the last group."""
    return x.reshape(*x.shape[:-2], -1)[..., :k]


def valid_mask(k: int, group_size: int | None) -> Bool[np.ndarray, "groups size"]:
    """False where `split_groups` put zeros of its own."""
    groups = num_groups(k, group_size)
    size = k if group_size is None else group_size
    return (np.arange(groups * size) < k).reshape(groups, size)


def group_lengths(k: int, group_size: int | None) -> np.ndarray:
    """True length of every group, int32 [groups]."""
    return valid_mask(k, group_size).sum(axis=-1).astype(np.int32)


def spread_groups(per_group: Shaped[Array, "*rows groups"], k: int, group_size: int | None) -> Shaped[Array, "*rows k"]:
    """Repeats a figure of each group over the elements of the group."""
    size = k if group_size is None else group_size
    return jnp.repeat(per_group, size, axis=-1)[..., :k]

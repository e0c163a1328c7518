"""RMSNorm of each head of the new token's queries and keys, before rotation, as Qwen3 has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core.fragments import VECTOR
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import HEAD_NORMS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import reduce_warpgroup, reduce_warps
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import load_head

# A head's numbers; and the same with their halves swapped, as the rotation takes them.
HeadPair = tuple[Float[Array, "128"], Float[Array, "128"]]


def load_gains(shape: LayersShape, norms: Mapping[str, tuple[Any, ...]], layer: Int[Array, ""]) -> list[HeadPair]:
    """A layer's gains for heads of queries and of keys; none if heads are not normalized."""
    if shape.head_norm_eps is None:
        return []
    start, size = layer * shape.head_dim, shape.head_dim
    return [tuple(load_head(norms[name][0], start, half, size) for half in (0, size // 2)) for name in HEAD_NORMS]


def normalize_heads(
    heads: Sequence[HeadPair],
    gains: Sequence[HeadPair],
    eps: float,
    warpgroup: Int[Array, ""],
    results: Any,
) -> list[HeadPair]:
    """Each head times its gains, divided by its root mean square; all threads of the warpgroup meet once.

    Args:
      heads: of the new token; of a head of 64 numbers these are two copies, and so are their squares.
      gains: `load_gains`, one pair for each head.
      eps: added to the mean square.
      warpgroup: of the calling threads.
      results: shared memory, float32 [heads, warps of the block], which no other warpgroup reads or writes meanwhile.
    """
    for i, (numbers, _) in enumerate(heads):
        reduce_warps(results.at[i], warpgroup, [numbers * numbers], "sum", VECTOR)
    synchronize()
    normalized = []
    for i, (pair, pair_gains) in enumerate(zip(heads, gains, strict=True)):
        factor = lax.rsqrt(reduce_warpgroup(results.at[i], warpgroup, "sum") * (1 / WARPGROUP) + eps)
        normalized.append(tuple(x * gain * factor for x, gain in zip(pair, pair_gains, strict=True)))
    return normalized

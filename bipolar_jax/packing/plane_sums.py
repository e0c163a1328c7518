"""Sums of the codes of every group, counted plane by plane without unpacking them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.host_memory import aligned_empty
from bipolar_jax.packing.words import WORD_BITS
from bipolar_jax.quantize.groups import num_groups, split_groups

_CHUNK_BYTES = 1 << 20
_HALF = WORD_BITS // 2


def high_planes(
    planes: UInt32[Array, "*batch planes n words"],
    dropped: int,
    number_format: BipolarFormat,
    k: int,
    group_size: int | None,
) -> tuple[UInt32[Array, "*batch kept n words"], Int[Array, "*batch n groups"]]:
    """The planes without the `dropped` lowest, and the sums of their codes, whose format is `number_format`.

    On a CPU NumPy does it, because compiling a program takes more memory than most arrays.
    """
    if isinstance(planes, jax.core.Tracer) or not _is_on_one_cpu(planes):
        kept = planes[..., dropped:, :, :]
        return kept, plane_sums(kept, number_format, k, group_size)
    *batch, bits, n, words = planes.shape
    kept = aligned_empty((*batch, bits - dropped, n, words), np.uint32)
    kept[...] = np.asarray(planes)[..., dropped:, :, :]
    return jax.device_put((kept, host_plane_sums(kept, number_format, k, group_size)), planes.sharding)


def times_power_of_two(scale: Float[Array, "*shape"], exponent: int) -> Float[Array, "*shape"]:
    """scale * 2^exponent; on a CPU NumPy does it, as for `high_planes`."""
    if isinstance(scale, jax.core.Tracer) or not _is_on_one_cpu(scale):
        return scale * 2.0**exponent
    with np.errstate(over="ignore"):
        return jax.device_put(np.ldexp(np.asarray(scale), exponent), scale.sharding)


def _is_on_one_cpu(array: Array) -> bool:
    if not isinstance(array, jax.Array) or not isinstance(array.sharding, jax.sharding.SingleDeviceSharding):
        return False
    return [device.platform for device in array.devices()] == ["cpu"]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def plane_sums(
    planes: UInt32[Array, "*batch planes n words"], number_format: BipolarFormat, k: int, group_size: int | None
) -> Int[Array, "*batch n groups"]:
    """Sum of the codes of every group of every row, int32. One program, so that XLA keeps no bits in memory."""
    if _by_words(group_size):
        # Bits of padding are 0.
        counts = jax.lax.population_count(planes).astype(jnp.int32)
        size = planes.shape[-1] if group_size is None else group_size // WORD_BITS
        groups = split_groups(counts, size)
    elif group_size % _HALF == 0:
        halves = jnp.stack([planes & jnp.uint32(2**_HALF - 1), planes >> jnp.uint32(_HALF)], axis=-1)
        counts = jax.lax.population_count(halves).astype(jnp.int32).reshape(*planes.shape[:-1], -1)
        groups = split_groups(counts[..., : num_groups(k, _HALF)], group_size // _HALF)
    else:
        positions = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * planes.ndim + (-1,))
        bits = (planes[..., None] >> positions) & jnp.uint32(1)
        groups = split_groups(bits.astype(jnp.int32).reshape(*planes.shape[:-1], -1)[..., :k], group_size)
    weights = jnp.asarray(number_format.plane_weights, jnp.int32).reshape((1,) * (planes.ndim - 3) + (-1, 1, 1))
    return jnp.sum(jnp.sum(groups, axis=-1, dtype=jnp.int32) * weights, axis=-3, dtype=jnp.int32)


def host_plane_sums(
    planes: UInt32[np.ndarray, "*batch planes n words"], number_format: BipolarFormat, k: int, group_size: int | None
) -> Int[np.ndarray, "*batch n groups"]:
    """`plane_sums` with NumPy, a few rows at a time, so that it needs about 10 MB beside its result."""
    *batch, _, n, words = planes.shape
    groups = num_groups(k, group_size)
    starts = np.arange(groups) * (0 if group_size is None else group_size)
    sums = np.zeros((*batch, n, groups), np.int32)
    step = max(1, _CHUNK_BYTES // max(4 * words, 1))
    for index in np.ndindex(*batch):
        for plane, weight in enumerate(number_format.plane_weights):
            for row in range(0, n, step):
                chunk = np.ascontiguousarray(planes[(*index, plane, slice(row, row + step))])
                if _by_words(group_size):
                    counts = np.add.reduceat(np.bitwise_count(chunk), starts // WORD_BITS, axis=-1, dtype=np.int32)
                else:
                    bits = np.unpackbits(chunk.astype("<u4", copy=False).view(np.uint8), axis=-1, bitorder="little")
                    counts = np.add.reduceat(bits, starts, axis=-1, dtype=np.int32)
                sums[(*index, slice(row, row + step))] += np.int32(weight) * counts
    return sums


def _by_words(group_size: int | None) -> bool:
    return group_size is None or group_size % WORD_BITS == 0

"""All loads of a K slice of prepared weights beside a token, by a warp of simulated threads."""

from __future__ import annotations

from types import ModuleType

import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.packing.fields import expand_part
from tests.support import warpgroup_simulator


def check_stages(
    products: ModuleType,
    bits: int,
    chunks: int,
    stages: int,
    token: np.ndarray,
    numbers: np.ndarray,
    rng: np.random.Generator,
    sums_of_thread: int,
) -> None:
    """The sums of two parts behind each other are exact, and no load meets another's banks.

    Args:
      products: `part_sums`, or what has functions of its names.
      bits, chunks: of the weights.
      stages: of a load.
      token: words of a slice.
      numbers: [stages, positions], what the words say.
      rng: of the weights and their terms.
      sums_of_thread: numbers that a thread adds up.
    """
    most = BipolarFormat(bits).max_value
    words = rng.integers(0, 2**32, (8, bits, 128), np.uint32)
    terms = None
    if chunks:
        scale = rng.integers(0, 255 // most + 1, (8, chunks, 16, 2))
        offset = rng.integers(0, 256 - scale * most)
        terms = np.stack([scale, offset], axis=-1).astype(np.uint8).reshape(8, chunks, 16, 4).view(np.uint32)[..., 0]
    expansion = Expansion(bits, chunks)
    warpgroup_simulator.bank_conflicts[0] = 0
    total = [np.zeros(128, np.int32)] * sums_of_thread
    for load in range(8 // stages):
        mine = slice(load * stages, (load + 1) * stages)
        arrays = [words[mine], token] + ([] if terms is None else [terms[mine]])
        pointers = [ptx.pointer(np.ascontiguousarray(array), ptx.SHARED) for array in arrays]
        for valid in (0, 1):  # 0 adds nothing
            options = (ptx.int32(load), [ptx.int32(valid)], stages, expansion)
            total = products.add_stages_of_warp(total, pointers, *options)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    sums = np.zeros(80, np.int32)
    for _ in range(2):
        products.add_sums_of_warp(ptx.pointer(sums, ptx.SHARED), total, ptx.int32(3), 48)
    weights = expand_part(jnp.asarray(words), None if terms is None else jnp.asarray(terms))
    expected = 2 * np.einsum("srk,sk->r", np.asarray(weights, np.int64), np.asarray(numbers, np.int64))
    wanted = np.zeros(80, np.int32)
    wanted[3:19], wanted[51:67] = expected[:16], expected[16:]
    np.testing.assert_array_equal(sums, wanted)

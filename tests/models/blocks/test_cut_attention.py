"""A cache whose positions two devices share: each holds every other one, and both get the context of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bipolar_jax.models.blocks.attention import attend_to_cache
from bipolar_jax.models.blocks.scoring import Scoring
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.cut_positions import CutPositions
from tests.support.integer_products import normal

MESH = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
BATCH, LENGTH, CAPACITY, HEADS, HEAD_DIM = 2, 4, 7, 4, 16
LENGTHS = np.array([4, 1], np.int32)
CASES = {
    "floats": (None, Scoring()),
    "8 bits, window, cap": (8, Scoring(window=3, softcap=5.0)),
    "4 bits, scale": (4, Scoring(scale=0.5)),
}


def heads(count, length, seed):
    return normal(BATCH, length * count * HEAD_DIM, seed=seed).reshape(BATCH, length, count, HEAD_DIM)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample(1)
def test_devices_that_share_positions_give_the_context_of_one(case):
    bits, scoring = CASES[case]
    keys, values = (heads(1, LENGTH, seed) for seed in range(2))
    tokens = [tuple(heads(count, 1, 3 * step + i) for i, count in enumerate((HEADS, 1, 1))) for step in range(4)]

    def attend(cut, queries):
        """The contexts of four new tokens: the last finds one of the caches full."""
        cache = KVCache.empty((1, BATCH, 1, CAPACITY, HEAD_DIM), jnp.float32, bits, jnp.asarray(LENGTHS), cut=cut)
        cache = cache.write_prompts(jnp.int32(0), keys, values)
        contexts = []
        for q, (_, k, v) in zip(queries, tokens, strict=True):
            context, cache = attend_to_cache((q, k, v), cache, jnp.int32(0), scoring=scoring)
            contexts.append(context)
            cache = cache.advance()
        return contexts

    queries = [q for q, _, _ in tokens]
    expected = jax.jit(lambda queries: attend(None, queries))(queries)
    cut, by_heads = CutPositions("model", 2, 2, CAPACITY), P(None, None, "model")
    shared = jax.shard_map(
        lambda queries: attend(cut, queries), mesh=MESH, in_specs=by_heads, out_specs=by_heads, check_vma=False
    )
    for found, one in zip(jax.jit(shared)(queries), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=2e-6, atol=2e-6)

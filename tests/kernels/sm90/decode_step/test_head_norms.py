"""Norms of heads of queries and keys in the decode step: interpreted, in the cache, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax import Precision
from bipolar_jax.kernels.semantics.prologue import LayerNorm
from bipolar_jax.kernels.sm90.decode_step.api import plan_decode_layers
from bipolar_jax.models.blocks import fused_decode
from bipolar_jax.models.blocks.rope import rope_tables
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.random_weights import random_packed
from tests.kernels.sm90.decode_step.layers_twin import Case, check_layers

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

SMALL = Case(2, 128, 128, 2, 1, 4, 8, 64, 40, prepared=True, group_size=64, head_dim=64, normalizes_heads=True)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (SMALL, 2),  # the second layer has gains of its own
        # Heads that share keys by fours, of two texts; codes are rotated.
        (
            dataclasses.replace(
                SMALL, layers=1, heads=4, head_dim=128, cache_bits=8, rotates_keys=True, texts=2, capacity=128
            ),
            8,
        ),
        (dataclasses.replace(SMALL, layers=1, a_bits=None, heads=3, head_dim=128), 3),
    ],
    ids=["heads of 64", "shared keys of two texts, rotated codes", "float tokens"],
)
@pytest.mark.covered("attention, by test_shared_heads.py; the model, by `make gpu-test` on qwen3-1.7b")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


def test_cached_keys_are_normalized_before_they_are_rotated(monkeypatch):
    """The kernel returns keys as they are projected; the model writes them to the cache."""
    config = TransformerConfig(
        vocab_size=8, hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, ffn_size=128,
        context_length=64, qk_norm=True,
    )  # fmt: skip
    layers = nnx.eval_shape(
        lambda: join_projections(random_packed(config, Precision(2, 8), key=jax.random.key(0), embed_bits=None)).layers
    )
    rng = np.random.default_rng(0)
    gain = jnp.asarray(rng.uniform(0.5, 1.5, (2, 64)), jnp.bfloat16)
    for norm in (layers.attention_norm, layers.ffn_norm, layers.attention.q_norm):
        norm.scale.set_value(jnp.ones(norm.scale.shape, jnp.bfloat16))
    layers.attention.k_norm.scale.set_value(gain)
    qkv = jnp.asarray(rng.standard_normal((2, 1, 4 * 64)), jnp.float32)

    def decode_layers(hidden, kernels, biases, norms, *operands, **options):
        assert {name: norm.gain.shape for name, norm in norms.items()} == {
            "qkv": (2, 128), "up": (2, 128), "queries": (2, 64), "keys": (2, 64)
        }  # fmt: skip
        return hidden, qkv

    monkeypatch.setattr(fused_decode.ops, "decode_layers", decode_layers)
    cache = KVCache.empty((2, 1, 1, 64, 64), jnp.float32, None, jnp.array([5], jnp.int32))
    tables = rope_tables(config, cache.lengths[:, None])
    _, cache = fused_decode.fused_layers(layers, config, jnp.zeros((1, 1, 128)), tables, cache)
    keys = np.asarray(qkv)[:, 0, 128:192]
    keys = keys / np.sqrt(np.mean(keys**2, axis=-1, keepdims=True) + config.norm_eps)
    a, b = np.split(keys * np.asarray(gain, np.float32), 2, axis=-1)
    cos, sin = (np.asarray(table)[0] for table in tables)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    np.testing.assert_allclose(np.asarray(cache.keys)[:, 0, 0, 5], expected, atol=1e-5)


@pytest.mark.parametrize("changed", ["epsilon", "kind", "one alone"])
def test_norms_of_heads_that_differ_are_refused(changed):
    @jax.eval_shape  # nothing is computed before it is refused
    def refused():
        operands, message = SMALL.operands(), "both norms of a layer must be of one kind and epsilon"
        norms = operands["norms"]
        keys = dataclasses.replace(norms["keys"], eps=1.0)
        if changed == "epsilon":
            norms["keys"] = keys
        elif changed == "kind":
            norms["keys"] = norms["queries"] = LayerNorm(keys.gain, keys.gain, keys.eps)
            message = "normalized by RMSNorm, not by LayerNorm"
        else:
            del norms["keys"]
        with pytest.raises(NotImplementedError, match=message):
            plan_decode_layers(**operands)

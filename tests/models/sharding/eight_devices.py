"""Tiny Transformers cut over meshes of eight devices, beside the same model on one: a program that prints JSON.

    python -m tests.models.sharding.eight_devices 2x4:W4A8g32 8x1:W2A2

It runs in a process of its own, because the number of devices is fixed when JAX starts. For each pair it prints, a line
each, whether logits, caches and tokens are equal, and what the devices exchange.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=2", "")
    + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import Precision, quantize_model
from bipolar_jax.models import TransformerConfig, generate, prepare_for_inference, random_packed, shard_model
from tests.ops.sharding.collectives import collectives

# Two key/value heads: 8 and 4 devices repeat them, 2 divide them.
CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=256,
    context_length=128,
    qkv_bias=True,
)
BATCH, LENGTH, CAPACITY = 8, 8, 16


def tiny_model(precision: str) -> Any:
    """Random weights; the output layer is packed too, so that logits are integer products."""
    model = random_packed(CONFIG, Precision.parse(precision), key=jax.random.key(0), dtype=jnp.float32, embed_bits=None)
    return quantize_model(model, [("^lm_head$", "W8A8")])


def programs(model: Any) -> tuple[Any, Any, list[np.ndarray], Any]:
    """Compiled prefill and decode; the logits of both for the same ids; and the last cache."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    lengths = np.full(BATCH, LENGTH, np.int32)
    prefill = jax.jit(lambda model, ids, lengths: model.prefill(ids, lengths, CAPACITY))
    prefill = prefill.lower(model, ids, lengths).compile()
    logits, cache = prefill(model, ids, lengths)
    decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache)).lower(model, ids[:, 0], cache).compile()
    found = [np.asarray(logits)]
    for token in range(2):
        logits, cache = decode(model, ids[:, token], cache)
        found.append(np.asarray(logits))
    return prefill, decode, found, cache


def compare(mesh: str, precision: str, with_tokens: bool) -> dict[str, Any]:
    """What the module prints of one pair."""
    model = tiny_model(precision)
    shape = tuple(map(int, mesh.split("x")))
    sharded = shard_model(model, jax.make_mesh(shape, ("data", "model")))
    one = prepare_for_inference(model)
    _, _, expected, _ = programs(one)
    prefill, decode, found, cache = programs(sharded)
    differences = np.max([np.abs(a - b).max(axis=-1) for a, b in zip(found, expected, strict=True)], axis=0)
    result = {
        "mesh": mesh,
        "precision": precision,
        "plan": str(sharded.plan),
        "largest difference": float(differences.max()),
        "texts that differ": int((differences > 5e-6).sum()),
        "prefill": collectives(prefill),
        "decode": collectives(decode),
        "cache": [list(cache.keys.shape), list(cache.keys.addressable_shards[0].data.shape)],
    }
    if with_tokens:
        prompts = [[1, 2, 3]] * (BATCH - 1) + [[5, 6]]
        result["tokens"] = [generate(each, prompts, 6, end_ids=()) for each in (one, sharded)]
        result["quantized cache"] = [generate(each, prompts, 4, end_ids=(), cache_bits=8) for each in (one, sharded)]
    return result


def main(arguments: list[str]) -> None:
    with_tokens = "--tokens" in arguments
    for pair in arguments:
        if not pair.startswith("--"):
            print(json.dumps(compare(*pair.split(":"), with_tokens)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A tiny Transformer on four devices of two processes, which exchange numbers by gloo over loopback.

    python -m tests.models.sharding.two_processes PORT 0 & python -m tests.models.sharding.two_processes PORT 1

Each prints a line of JSON for each mesh: the largest difference of its logits from those of one device, and both
lists of tokens.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=2", "")
    + " --xla_force_host_platform_device_count=2"
)

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import Precision
from bipolar_jax.models import TransformerConfig, generate, prepare_for_inference, random_packed, shard_model

CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=128,
    context_length=128,
)
PROMPTS = [[1, 2, 3], [5, 6]]


def main(port: str, process: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    precision = Precision.parse("W4A8g32")
    model = random_packed(CONFIG, precision, key=jax.random.key(0), dtype=jnp.float32, embed_bits=None)
    one = prepare_for_inference(model)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    expected = np.asarray(jax.jit(lambda model, ids: model(ids))(one, ids))
    tokens = generate(one, PROMPTS, 4, end_ids=())
    for shape in ((1, 4), (2, 2)):
        sharded = shard_model(jax.tree.map(np.asarray, model), jax.make_mesh(shape, ("data", "model")))
        parts = sharded(ids).addressable_shards
        result = {
            "mesh": shape,
            "processes": jax.process_count(),
            "largest difference": max(float(np.abs(part.data - expected[part.index]).max()) for part in parts),
            "tokens": [tokens, generate(sharded, PROMPTS, 4, end_ids=())],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

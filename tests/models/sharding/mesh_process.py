"""One process of `on_meshes`: makes the models, runs them on one device and on the mesh, and prints what it finds."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bipolar_jax import Precision, load, quantization_aware, quantize_model, save
from bipolar_jax.models import (
    Transformer,
    TransformerConfig,
    generate,
    prepare_for_inference,
    random_packed,
    shard_model,
)
from bipolar_jax.models.sharding.sharded_transformer import place_model
from bipolar_jax.models.sharding.training import plan_training
from bipolar_jax.packing.host_memory import is_shared, on_host
from experiments.distributed.collectives import collectives
from experiments.distributed.processes import from_first
from tests.models.sharding.on_meshes import BATCH, HIDDEN, LAYERS, LENGTH

CAPACITY = 16
# Two key/value heads: 8 and 4 devices repeat them, 2 divide them. A device of 8 has one group of 64 of the width.
CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=512,
    context_length=128,
    qkv_bias=True,
)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)
PROMPTS = [[1, 2, 3]] * (BATCH - 1) + [[5, 6]]


@functools.cache
def packed_model(precision: str) -> Transformer:
    """Random weights on the host; the output layer is packed too, so that logits are integer products."""
    model = random_packed(CONFIG, Precision.parse(precision), key=jax.random.key(0), dtype=jnp.float32, embed_bits=None)
    return jax.tree.map(np.asarray, quantize_model(model, [("^lm_head$", "W8A8")]))


@functools.cache
def of_one_device(precision: str) -> Transformer:
    return prepare_for_inference(jax.device_put(packed_model(precision), jax.local_devices()[0]))


def programs(model: Any, ids: np.ndarray) -> tuple[Any, Any, list[np.ndarray], Any]:
    """Compiled prefill and decode; the logits of both for the same ids; and the last cache."""
    lengths = np.full(len(ids), LENGTH, np.int32)
    prefill = jax.jit(lambda model, ids, lengths: model.prefill(ids, lengths, CAPACITY))
    prefill = prefill.lower(model, ids, lengths).compile()
    logits, cache = prefill(model, ids, lengths)
    decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache)).lower(model, ids[:, 0], cache).compile()
    found = [on_host(logits)]
    for token in range(2):
        logits, cache = decode(model, ids[:, token], cache)
        found.append(on_host(logits))
    return prefill, decode, found, cache


@functools.cache
def logits_of_one_device(precision: str, texts: int) -> list[np.ndarray]:
    """Logits of all texts, so many at a time: as many as a device of the mesh has."""
    model = of_one_device(precision)
    parts = [programs(model, IDS[start : start + texts])[2] for start in range(0, BATCH, texts)]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


@functools.cache
def texts_of_one_device(precision: str) -> list[Any]:
    return [generate(of_one_device(precision), PROMPTS, 6, end_ids=(), cache_bits=bits) for bits in (None, 8)]


def compare(mesh: str, precision: str, generates: bool, trains: bool) -> dict[str, Any]:
    """What `on_meshes` prints of one pair."""
    data, parts = map(int, mesh.split("x"))
    devices = jax.make_mesh((data, parts), ("data", "model"))
    model = packed_model(precision)
    sharded = shard_model(model, devices)
    prefill, decode, found, cache = programs(sharded, IDS)
    is_first = jax.process_index() == 0
    expected = logits_of_one_device(precision, BATCH // data) if is_first else found
    differences = np.max([np.abs(a - b).max(axis=-1) for a, b in zip(found, expected, strict=True)], axis=0)
    result = {
        "mesh": mesh,
        "precision": precision,
        "processes": jax.process_count(),
        "largest difference": float(differences.max()),
        "texts that differ": int((differences > 5e-6).sum()),
        "has offsets": model.layers.ffn.down_proj.kernel.get_value().offset is not None,
        "prefill": collectives(prefill),
        "decode": collectives(decode),
        "cache": [list(cache.keys.shape), list(cache.keys.addressable_shards[0].data.shape)],
    }
    if jax.process_count() > 1:
        check_saving(model, devices)
    if generates:
        texts = [generate(sharded, PROMPTS, 6, end_ids=(), cache_bits=bits) for bits in (None, 8)]
        pairs = zip(texts_of_one_device(precision) if is_first else texts, texts, strict=True)
        result["tokens"], result["quantized cache"] = map(list, pairs)
    if trains:
        result["training"] = training_step((data, parts), precision)
    return result


def check_saving(model: Transformer, devices: Mesh) -> None:
    """Processes write weights from their shards as one of them does, read their own back, and learn of failures."""

    def weights(model):
        kernels = (model.layers.attention.o_proj.kernel, model.layers.ffn.up_proj.kernel)
        return {"rows": kernels[0].get_value(), "columns": kernels[1].get_value()}

    whole, placed = weights(model), weights(place_model(model, devices))
    with tempfile.TemporaryDirectory() as own:
        folder = Path(from_first(lambda: own))
        save(folder / "shards", placed)
        save(f"{own}/whole", whole)
        assert (folder / "shards").read_bytes() == Path(own, "whole").read_bytes()
        read = load(folder / "shards", shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))
        for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(placed), strict=True):
            for shard, expected in zip(one.addressable_shards, other.addressable_shards, strict=True):
                np.testing.assert_array_equal(shard.data, expected.data)
        problem = "none"
        try:
            save(Path(own, "whole", "below a file"), placed)
        except OSError as error:
            problem = str(error)
        from_first(lambda: None)  # waits for all, which read what the first deletes
        writes = jax.process_index() == 0 or not any(map(is_shared, jax.tree.leaves(placed)))
        says = "File exists" if writes else "the first process cannot write"
        assert says in problem, problem


@functools.cache
def student(precision: str) -> tuple[Any, Any, Any, Any]:
    """Structure, parameters on the host and the rest of a model in training; and a jitted step of plain descent."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    rules = [("^layers/", Precision.parse(precision, "absmax"))]
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: quantization_aware(model, rules)), nnx.Param, ...)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), params)

    def loss(params, ids):
        logits = nnx.merge(graph, params, rest)(ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(params, ids):
        value, gradients = jax.value_and_grad(loss)(params, ids)
        return value, jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients)

    return nnx.merge(graph, params, rest), params, jax.jit(step)


@functools.cache
def step_of_one_device(precision: str) -> tuple[Any, Any]:
    _, params, step = student(precision)
    return jax.tree.map(np.asarray, step(jax.device_put(params, jax.local_devices()[0]), IDS))


def training_step(sizes: tuple[int, int], precision: str) -> dict[str, Any]:
    """A step of plain gradient descent on a mesh, beside that of one device."""
    model, params, step = student(precision)
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    plan = plan_training([model], mesh.shape)

    def placed(path, leaf):
        name = "/".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        return jax.device_put(leaf, NamedSharding(mesh, plan.spec(name, leaf.ndim)))

    on_mesh = jax.tree_util.tree_map_with_path(placed, params)
    ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
    program = step.lower(on_mesh, ids).compile()
    loss, trained = program(on_mesh, ids)
    trained = jax.tree.map(on_host, trained)
    expected_loss, expected = step_of_one_device(precision) if jax.process_index() == 0 else (loss, trained)
    pairs = [
        (one - before, other - before)
        for before, one, other in zip(*map(jax.tree.leaves, (params, expected, trained)), strict=True)
    ]
    differences = [float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in pairs]
    return {
        "loss": abs(float(loss) / float(expected_loss) - 1),
        "updates": max(differences),
        "gathered weights": [
            shapes for kind, shapes in collectives(program) if kind == "all-gather" and "f32" in shapes
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", nargs="+")
    for name in ("port", "processes", "process"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("generates", "trains"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    if arguments.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"localhost:{arguments.port}"
        jax.distributed.initialize(address, num_processes=arguments.processes, process_id=arguments.process)
    for pair in arguments.pairs:
        found = compare(*pair.split(":"), arguments.generates, arguments.trains)
        if jax.process_index() == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # JAX's own exit would wait for the others, which wait for this one

"""Transformers cut over a mesh give what one device gives, and exchange what the plan says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from bipolar_jax import Precision
from bipolar_jax.models import (
    join_projections,
    perplexity,
    prepare_for_inference,
    random_packed,
    shard_model,
)
from bipolar_jax.models.sharding.plan import plan_shards
from bipolar_jax.models.sharding.sharded_transformer import place_model, two_axes
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import Hadamard
from tests.models.sharding.tiny_config import CONFIG

ROOT = Path(__file__).resolve().parents[3]
MESHES, PRECISIONS = ("1x8", "2x4", "4x2", "8x1"), ("W4A8", "W4A8g32", "W2A2")
PAIRS = [*itertools.product(MESHES, PRECISIONS), ("2x4", "W1A1"), ("2x4", "W8A8")]


def on_eight_devices(*arguments: str) -> list[dict]:
    """What `eight_devices` prints, in a process of its own."""
    command = [sys.executable, "-m", "tests.models.sharding.eight_devices", *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def check(found: dict, batch: int = 8, length: int = 8) -> None:
    """Equal results; two reductions of sums a layer, and of two numbers a token before each, if weights are cut."""
    data, parts = map(int, found["mesh"].split("x"))
    # Attention in float32 rounds as XLA vectorizes its shapes, and a number between two steps may then take the other:
    # so it does where half of a batch runs alone on one device. At 2 bits one text in eight was seen to.
    assert found["texts that differ"] <= 1
    for name, tokens in (("prefill", batch // data * length), ("decode", batch // data)):
        per_token = f"s32[{tokens}] " if found["precision"] in ("W4A8", "W8A8") else ""  # these have offsets
        per_column = "" if found["precision"] == "W1A1" else " s32[64]"  # tokens of one bit have no zero
        sums = ["all-reduce", f"{per_token}s32[{tokens},64]{per_column}"]
        expected = [["all-reduce", f"f32[{tokens},2]"]] * 2 + [sums] * 2 if parts > 1 else []
        assert found[name] == expected
    whole, local = found["cache"]
    assert whole == [2, batch, max(2, parts), 16, 32]
    assert local == [2, batch // data, max(2, parts) // parts, 16, 32]
    for name in ("tokens", "quantized cache"):
        one, sharded = found.get(name, (None, None))
        assert one == sharded


def test_a_mesh_of_eight():
    """About 10 s of CPU: JAX starts anew, for eight devices."""
    for found in on_eight_devices("2x4:W4A8g32"):
        check(found)


@pytest.mark.covered("test_a_mesh_of_eight, one of these")
@pytest.mark.parametrize(("mesh", "precision"), PAIRS)
def test_meshes_of_eight(mesh, precision):
    (found,) = on_eight_devices("--tokens", f"{mesh}:{precision}")
    check(found)


@pytest.mark.covered("test_a_mesh_of_eight; the parts are the same, only how numbers travel is not")
def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.models.sharding.two_processes", port]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(index)], **options) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-4000:]
        results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert [found["mesh"] for found in results] == [[1, 4], [2, 2]]
        for found in results:
            assert found["processes"] == 2
            assert found["largest difference"] < 5e-6
            assert found["tokens"][0] == found["tokens"][1]


def model_of(precision="W2A2", place=None, **fields):
    config, options = dataclasses.replace(CONFIG, **fields), {"dtype": jnp.float32, "embed_bits": None, "place": place}
    return random_packed(config, Precision.parse(precision), key=jax.random.key(0), **options)


def shapes_of(*precision, **fields):
    """`model_of` without numbers."""
    return nnx.eval_shape(lambda: model_of(*precision, **fields))


@pytest.fixture(scope="module")
def model():
    return model_of()


def test_what_does_not_divide_is_whole_and_said(model):
    plan = plan_shards(model, {"data": 1, "model": 4})
    assert (plan.attention, plan.ffn, plan.output, plan.whole) == (True, True, True, ())
    assert plan.repeats_kv_heads(CONFIG)
    assert not plan_shards(model, {"model": 2}).repeats_kv_heads(CONFIG)
    plan = plan_shards(shapes_of(num_heads=6, num_kv_heads=3, vocab_size=49), {"data": 2, "model": 4})
    assert (plan.attention, plan.ffn, plan.output) == (False, True, False)
    assert str(plan).splitlines() == [
        "2 x 4 devices (data, model); cut over model: feed-forward blocks",
        "  attention whole on every device: 6 heads do not divide over 4 devices",
        "  output layer whole on every device: 49 tokens do not divide over 4 devices",
    ]
    assert "it is the embedding" in str(plan_shards(shapes_of(tie_embeddings=True), {"model": 2}))
    assert "do not divide each other" in str(plan_shards(shapes_of(num_heads=12, num_kv_heads=6), {"model": 4}))
    alibi = dict(positions="alibi", norm="layer", ffn="gelu", linear_bias=True, qkv_bias=True)
    assert "the slopes of ALiBi belong to the heads" in str(plan_shards(shapes_of(**alibi), {"model": 2}))


def test_rows_are_cut_at_ends_of_words_and_groups():
    plan = plan_shards(shapes_of("W4A8g64", hidden_size=64, ffn_size=192), {"model": 2})
    assert (plan.attention, plan.ffn) == (True, False)
    assert "down_proj: k=192 of" in plan.whole[0]
    assert "cannot be cut into 2 parts of a multiple of 64" in plan.whole[0]


def test_rotations_that_mix_devices_are_not_cut():
    def plan(blocks, signs=None):
        rotation = Rotation(ffn=Hadamard((128 // blocks,), blocks, signs))
        return plan_shards(shapes_of().with_rotation(rotation), {"model": 4})

    assert plan(4).ffn
    config = dataclasses.replace(CONFIG, rotation=Rotation(ffn=Hadamard((32,), 4)))
    assert plan(4).config_of_device(config).rotation.ffn == Hadamard((32,), 1)
    assert "rotated in 2 blocks of 64, which mixes the numbers of 4 devices" in plan(2).whole[0]
    assert "rotated with random signs" in plan(4, 7).whole[0]


def test_impossible_meshes_are_refused_with_the_numbers(model):
    with pytest.raises(ValueError, match="cannot be cut over 3 devices: attention .* 4 heads do not divide over 3"):
        plan_shards(model, {"model": 3})
    with pytest.raises(ValueError, match="the mesh has the axis 'pipe': models are cut over 'data' and 'model' alone"):
        two_axes(jax.make_mesh((2,), ("pipe",)))
    with pytest.raises(ValueError, match="qkv_proj is joined: cut the model before it is prepared"):
        plan_shards(join_projections(model), {"model": 2})
    with pytest.raises(ValueError, match="is a UnpackedArray: cut the model first"):
        plan_shards(prepare_for_inference(model), {"model": 2})
    assert dict(two_axes(jax.make_mesh((2,), ("model",))).shape) == {"data": 1, "model": 2}


def test_texts_that_do_not_divide_are_refused(model):
    sharded = shard_model(model, jax.make_mesh((2,), ("data",)))
    with pytest.raises(ValueError, match="3 texts do not divide over 2 devices of 'data': add texts"):
        sharded(np.zeros((3, 4), np.int32))


@pytest.mark.parametrize("axis", ["model", "data"])
@pytest.mark.covered("test_a_mesh_of_eight, by the same parts; scores, by inference/test_perplexity.py")
def test_a_cut_model_is_scored_as_the_whole_one(model, axis):
    ids = np.arange(24) % CONFIG.vocab_size
    options = {"windows": 3, "window_length": 8, "windows_per_step": 3}
    expected = perplexity(model, ids, **options)
    found = perplexity(shard_model(model, jax.make_mesh((2,), (axis,))), ids, **options)
    np.testing.assert_allclose(found.window_losses, expected.window_losses, rtol=1e-4)


def test_a_placed_model_is_the_same_model(model):
    placed = place_model(model, jax.make_mesh((2,), ("model",)))
    down = placed.layers.ffn.down_proj.kernel.get_value()
    assert down.planes.sharding.spec == P(None, None, None, "model")
    assert down.planes.addressable_shards[0].data.shape == (1, 2, 32, 2)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(one, other)

"""Transformers cut over a mesh give what one device gives, and exchange what the plan says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from bipolar_jax import Precision
from bipolar_jax.models import (
    explain_model,
    generate,
    join_projections,
    perplexity,
    prepare_for_inference,
    random_packed,
    shard_model,
)
from bipolar_jax.models.sharding.plan import group_size_of_share, plan_shards
from bipolar_jax.models.sharding.sharded_transformer import place_model, two_axes
from bipolar_jax.models.sharding.shares import shares_of_heads
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import Hadamard
from experiments.distributed.collectives import collectives
from tests.models.sharding.on_meshes import TESTED, check, found_on_meshes
from tests.models.sharding.tiny_config import CONFIG

MESH = jax.make_mesh((2,), ("model",))


def test_a_mesh_of_eight_in_two_processes():
    """About 29 s of CPU: JAX starts anew in each process, for four devices."""
    (found,) = found_on_meshes("2x4:W4A8g32", processes=2)
    check(found)
    assert found["processes"] == 2


@pytest.mark.covered("test_a_mesh_of_eight_in_two_processes, one of these")
@pytest.mark.parametrize("pair", TESTED)
def test_meshes_of_eight(pair):
    (found,) = found_on_meshes(pair, options=("--generates", "--trains"))
    check(found)


@pytest.mark.covered("test_a_mesh_of_eight_in_two_processes; generating and training, by those of one process")
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_generate_and_train(processes):
    (found,) = found_on_meshes("2x4:W4A8g32", processes=processes, options=("--generates", "--trains"))
    check(found)


def model_of(precision="W2A2", place=None, **fields):
    config, options = dataclasses.replace(CONFIG, **fields), {"dtype": jnp.float32, "embed_bits": None, "place": place}
    return random_packed(config, Precision.parse(precision), key=jax.random.key(0), **options)


def shapes_of(*precision, **fields):
    """`model_of` without numbers."""
    return nnx.eval_shape(lambda: model_of(*precision, **fields))


@pytest.fixture(scope="module")
def model():
    return model_of()


def test_what_does_not_divide_is_padded_and_said(model):
    plan = plan_shards(model, {"data": 1, "model": 4})
    assert (plan.attention, plan.ffn, plan.output, plan.whole) == (True, True, True, ())
    assert "keys and values repeated: 2 heads on 4 devices" in str(plan)
    assert len(str(plan_shards(model, {"model": 2}, cut_tokens=False)).splitlines()) == 1
    fields = dict(num_heads=9, num_kv_heads=3, vocab_size=49, ffn_size=160)
    plan = plan_shards(shapes_of("W4A8", **fields), {"data": 2, "model": 2}, cut_tokens=False)
    assert str(plan).splitlines() == [
        "2 x 2 devices (data, model); cut over model: attention, feed-forward blocks, output layer",
        "  attention padded: 9 heads and 3 of keys and values; a device has 6 and 2, some zeros",
        "  feed-forward blocks padded: 160 columns; a device has 96, some zeros",
        "  output layer padded: 49 tokens; a device has 32, some zeros",
    ]
    config = dataclasses.replace(CONFIG, **fields)
    of_device = plan.config_of_device(config)
    assert (of_device.num_heads, of_device.num_kv_heads, of_device.ffn_size) == (6, 2, 96)
    assert plan.spec(("layers", "ffn", "up_proj", "kernel"), np.zeros((1, 32, 160)), config) == P(None, None, None)
    assert plan.device_bytes(("lm_head", "kernel"), np.zeros((32, 49), np.int8), config) == 32 * 32


def test_what_cannot_be_padded_is_whole_and_said():
    plan = plan_shards(shapes_of(tie_embeddings=True, num_heads=1, num_kv_heads=1), {"model": 2})
    assert (plan.attention, plan.ffn, plan.output) == (False, True, False)
    assert plan.whole == (
        "attention whole on every device: 1 heads do not divide over 2 devices",
        "output layer whole on every device: it is the embedding",
    )
    alibi = dict(positions="alibi", norm="layer", ffn="gelu", linear_bias=True, qkv_bias=True)
    assert "the slopes of ALiBi belong to the heads" in str(plan_shards(shapes_of(**alibi), {"model": 2}))
    with_offsets = shapes_of("W4A1", ffn_size=96, num_heads=3, num_kv_heads=1)
    with pytest.raises(ValueError, match="o_proj: tokens of 1 bit have no 0, and its columns have offsets"):
        plan_shards(with_offsets, {"model": 2})


@pytest.mark.parametrize(
    ("heads", "parts", "queries", "keys"),
    [
        ((9, 3), 2, ((0, 6), (6, 3)), ((0, 2), (2, 1))),
        ((12, 6), 4, ((0, 4), (4, 4), (8, 4), (12, 0)), ((0, 2), (2, 2), (4, 2), (6, 0))),
        ((8, 2), 4, ((0, 2), (2, 2), (4, 2), (6, 2)), ((0, 1), (0, 1), (1, 1), (1, 1))),
        ((6, 2), 5, ((0, 2), (2, 1), (3, 2), (5, 1), (0, 0)), ((0, 1), (0, 1), (1, 1), (1, 1), (0, 0))),
    ],
)
def test_queries_go_with_their_keys(heads, parts, queries, keys):
    found = shares_of_heads(*heads, parts)
    assert [tuple(zip(share.starts, share.counts, strict=True)) for share in found] == [queries, keys]
    assert found[0].size == max(count for _, count in queries)


def test_positions_are_cut_where_devices_share_heads(model):
    plan = plan_shards(model, {"model": 4}, cut_positions=True, cut_tokens=False)
    assert str(plan).splitlines()[1:] == [
        "  keys and values repeated: 2 heads on 4 devices, each of which caches one position in 2"
    ]
    assert plan.cut_positions(9).groups == [[0, 1], [2, 3]]
    for parts in (2, 3):
        with pytest.raises(ValueError, match=f"equally many of {parts} devices, two or more, share each of 2 heads"):
            plan_shards(model, {"model": parts}, cut_positions=True)


@pytest.mark.covered("blocks/test_cut_attention.py, by the same cache")
def test_a_model_with_cut_positions_writes_the_same_text():
    """Devices share the one head of keys; three tokens follow two prompts, the last of which finds the cache full."""
    model = model_of("W4A8", num_heads=3, num_kv_heads=1)
    sharded = shard_model(model, MESH, cut_positions=True)
    whole = prepare_for_inference(model)
    ids, lengths = np.arange(8, dtype=np.int32).reshape(2, 4), np.array([4, 3])
    (one, cache), (found, own) = (each.prefill(ids, lengths, 5) for each in (whole, sharded))
    assert own.keys.addressable_shards[0].data.shape == (1, 2, 1, 3, 32)
    for _ in range(3):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)
        tokens = np.argmax(one, axis=-1).astype(np.int32)
        np.testing.assert_array_equal(np.argmax(found, axis=-1), tokens)
        (one, cache), (found, own) = whole.decode(tokens, cache), sharded.decode(tokens, own)
    assert own.capacity == 5


def test_rows_are_cut_at_ends_of_words_and_groups():
    plan = plan_shards(shapes_of("W4A8g64", hidden_size=64, ffn_size=192), {"model": 2}, cut_tokens=False)
    assert (plan.width.size, plan.width.counts) == (128, (128, 64))
    assert str(plan).splitlines()[1:] == ["  feed-forward blocks padded: 192 columns; a device has 128, some zeros"]
    # Three heads of 32 each: a group of 64 ends within the second.
    fields = dict(hidden_size=64, num_heads=6, num_kv_heads=2)
    plan = plan_shards(shapes_of("W4A8g64", **fields), {"model": 2})
    assert plan.realigned == ("o_proj",)
    assert "o_proj realigned: devices do not end where its words or groups do, which are cut there" in str(plan)
    o_proj = shapes_of("W4A8g64", **fields).layers.attention.o_proj.kernel.get_value()
    assert group_size_of_share(o_proj, plan.rows(32)["o_proj"]) == 32


PADDED = {
    "heads of keys": ("W4A8g64", {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "ffn_size": 192}),
    "queries of one head": ("W4A8", {"num_heads": 3, "num_kv_heads": 1, "ffn_size": 96}),
    "groups within heads": ("W2A2g64", {"num_heads": 6, "ffn_size": 96}),
    "one bit": ("W1A1", {"num_heads": 9, "num_kv_heads": 3, "head_dim": 16, "ffn_size": 96}),
}


@pytest.mark.parametrize("case", PADDED)
@pytest.mark.sample(1)
@pytest.mark.covered("ranges and zeros, by packing/test_cuts.py; the plan, by the tests above")
def test_padded_models_give_the_bits_of_whole_ones(case):
    precision, fields = PADDED[case]
    model = model_of(precision, hidden_size=64, vocab_size=49, qkv_bias=True, **fields)
    sharded, one = shard_model(model, MESH), prepare_for_inference(model)
    ids = np.arange(8, dtype=np.int32).reshape(2, 4)
    found = sharded(ids)
    assert found.shape == (2, 4, 49)
    np.testing.assert_array_equal(found, one(ids))


@pytest.mark.covered("the test above: a cache has the heads that a device computes")
def test_a_padded_model_decodes_as_the_whole_one():
    model = model_of("W4A8", num_heads=3, num_kv_heads=1, ffn_size=96, vocab_size=49)
    sharded, one = shard_model(model, MESH), prepare_for_inference(model)
    texts = [generate(each, [[1, 2, 3], [4]], 6, end_ids=()) for each in (sharded, one)]
    assert texts[0] == texts[1]


def test_rotations_that_mix_devices_are_not_cut():
    def plan(blocks, signs=None):
        rotation = Rotation(ffn=Hadamard((128 // blocks,), blocks, signs))
        return plan_shards(shapes_of().with_rotation(rotation), {"model": 4})

    assert plan(4).ffn
    config = dataclasses.replace(CONFIG, rotation=Rotation(ffn=Hadamard((32,), 4)))
    assert plan(4).config_of_device(config).rotation.ffn == Hadamard((32,), 1)
    assert plan(2).width.counts == (64, 64, 0, 0)
    assert "the width 128 does not divide over 4 devices in multiples of 128" in plan(1).whole[0]
    assert "rotated with random signs" in plan(4, 7).whole[0]


def test_impossible_meshes_are_refused_with_the_numbers(model):
    tiny = shapes_of(num_heads=1, num_kv_heads=1, ffn_size=32)
    with pytest.raises(ValueError, match="over 3 devices: attention .* 1 heads do not .* the width 32 does not divide"):
        plan_shards(tiny, {"model": 3})
    with pytest.raises(ValueError, match="the mesh has the axis 'pipe': models are cut over 'data' and 'model' alone"):
        two_axes(jax.make_mesh((2,), ("pipe",)))
    with pytest.raises(ValueError, match="the mesh must be a jax.sharding.Mesh, such as jax.make_mesh makes, got None"):
        two_axes(None)
    with pytest.raises(ValueError, match="qkv_proj is joined: cut the model before it is prepared"):
        plan_shards(join_projections(model), {"model": 2})
    with pytest.raises(ValueError, match="is a UnpackedArray: cut the model first"):
        plan_shards(prepare_for_inference(model), {"model": 2})
    assert dict(two_axes(MESH).shape) == {"data": 1, "model": 2}


@pytest.mark.covered(
    "products of gathered codes, by ops/sharding; a cut model, by test_a_mesh_of_eight_in_two_processes"
)
def test_long_prompts_are_cut_between_products(model):
    """Two texts of 72 tokens on two devices: sums are scattered over positions, codes of 2 bits are gathered."""
    model = model_of(context_length=128)
    sharded, whole = shard_model(model, MESH), prepare_for_inference(model)
    ids = (np.arange(144, dtype=np.int32) % 48).reshape(2, 72)
    program = jax.jit(lambda model, ids: model(ids)).lower(sharded, ids).compile()
    np.testing.assert_allclose(program(sharded, ids), whole(ids), rtol=1e-5, atol=1e-5)
    exchanged = collectives(program)
    assert exchanged.count(("reduce-scatter", "s32[72,32]")) == 2
    assert exchanged.count(("all-gather", "u32[2,144,1]")) == 2
    assert ("all-reduce", "s32[144,32]") not in [(kind, shapes.split(" ")[0]) for kind, shapes in exchanged]
    assert ("all-gather", "f32[2,72,32]") in exchanged  # once, after the last layer


def test_the_plan_counts_what_prompts_exchange(model):
    plan = plan_shards(model, {"model": 2})
    assert "prompts of 130 tokens or more cut over model: sums reduce-scattered, codes gathered" in str(plan)
    assert [plan.scatters(*texts) for texts in ((2, 72), (1, 128), (1, 131), (1, 130))] == [True, False, False, True]
    columns = 4 * 32
    assert plan.reduced_bytes(144, 32, 2, scatters=False) == columns + 4 * 144 * 32
    assert plan.reduced_bytes(144, 32, 2, scatters=True) == columns + 2 * 144 * 32 + 72 * (32 / 4 + 12)
    assert not plan_shards(model, {"model": 2}, cut_tokens=False).scatters(2, 72)
    assert not plan_shards(shapes_of(tie_embeddings=True, num_heads=1, num_kv_heads=1), {"model": 2}).cuts_tokens


def test_a_mesh_is_explained_by_what_a_device_runs():
    """Decoding adds sums in the middle of a layer; long prompts are cut between products."""
    sharded = jax.eval_shape(lambda: shard_model(model_of(context_length=256), MESH))
    found = explain_model(sharded, 1, 192, capacity=256)
    assert "no way out for sums in the middle, and each device runs layer by layer" in found.not_one_kernel
    decode, prefill = ({step.name: step.not_fused for step in steps} for steps in (found.decode, found.prefill))
    assert decode["o"] == "devices of model find each token's extremes first, and its sums are added before scales"
    assert decode["gate/up"] is None
    assert prefill["down"].endswith("its sums are added and divided by tokens before scales")
    assert prefill["gate/up"] == "tokens are quantized where they are, and devices of model gather their codes"
    scaled = jax.eval_shape(lambda: shard_model(model_of("W4A8g64f", hidden_size=64), MESH))
    (down,) = (step for step in explain_model(scaled, 1, 8).decode if step.name == "down")
    assert "no kernel gives sums of float groups where k or tokens are cut" in str(down.runs)
    assert down.not_fused.endswith("its sums are added after scales")
    cut = jax.eval_shape(lambda: shard_model(model_of(num_kv_heads=1), MESH, cut_positions=True))
    (attention,) = (step for step in explain_model(cut, 1, 8).decode if "attention" in step.name)
    assert attention.not_fused == "2 devices share the positions, and the kernel gives no partial results"


def test_texts_that_do_not_divide_are_refused(model):
    sharded = shard_model(model, jax.make_mesh((2,), ("data",)))
    with pytest.raises(ValueError, match="3 texts do not divide over 2 devices of 'data': add texts"):
        sharded(np.zeros((3, 4), np.int32))


@pytest.mark.parametrize("axis", ["model", "data"])
@pytest.mark.covered(
    "test_a_mesh_of_eight_in_two_processes, by the same parts; scores, by inference/test_perplexity.py"
)
def test_a_cut_model_is_scored_as_the_whole_one(model, axis):
    ids = np.arange(24) % CONFIG.vocab_size
    options = {"windows": 3, "window_length": 8, "windows_per_step": 3}
    expected = perplexity(model, ids, **options)
    found = perplexity(shard_model(model, jax.make_mesh((2,), (axis,))), ids, **options)
    np.testing.assert_allclose(found.window_losses, expected.window_losses, rtol=1e-4)


def test_a_placed_model_is_the_same_model(model):
    placed = place_model(model, MESH)
    down = placed.layers.ffn.down_proj.kernel.get_value()
    assert down.planes.sharding.spec == P(None, None, None, "model")
    assert down.planes.addressable_shards[0].data.shape == (1, 2, 32, 2)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(one, other)

"""A Transformer trains on a mesh as on one device: the bits of every product, losses and gradients to rounding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bipolar_jax as bj
from bipolar_jax.models import Transformer, random_packed
from bipolar_jax.models.sharding.sharded_transformer import place_model
from bipolar_jax.models.sharding.training import plan_training
from experiments.distributed.collectives import collectives
from tests.models.sharding.tiny_config import CONFIG
from tests.support.integer_products import normal

PRECISIONS = ("W2A2", "W1A1", "W4A8", "W4A8g32", "W4A8g32f", "W8A8", "W1.58A8")
PRODUCTS = {"rows": P("model"), "columns": P(None, "model"), "tokens": P()}
AUTO = (AxisType.Auto, AxisType.Auto)


def student(precision="W4A8g32", layers="^layers/", **fields):
    """Random weights; layers that train at the precision. For shapes alone within `nnx.eval_shape`."""
    model = Transformer(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0))
    return bj.quantization_aware(model, [(layers, bj.Precision.parse(precision, "absmax"))])


def plan(parts, *precisions, **fields):
    models = [nnx.eval_shape(lambda name=name: student(name, **fields)) for name in precisions or ("W4A8g32",)]
    return plan_training(models, {"data": 2, "model": parts})


def loss(model, ids):
    logits = model(ids)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@pytest.mark.parametrize("cut", PRODUCTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.sample(1)
def test_products_have_the_bits_of_one_device(precision, cut):
    """Scales, codes and sums of weights that are packed where they are; only the gradient's float sums round anew."""
    dot_general = bj.DotGeneral.of(bj.Precision.parse(precision, "minmax" if precision == "W4A8" else None))
    x, w = normal(4, 128), normal(128, 6, seed=1)

    def value_and_gradients(x, w):
        y, pull_back = jax.vjp(lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ()))), x, w)
        return y, pull_back(jnp.cos(y))

    expected, gradients = jax.jit(value_and_gradients)(x, w)
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=AUTO)
    tokens = NamedSharding(mesh, P("model") if cut == "tokens" else P())
    found, ours = jax.jit(value_and_gradients)(
        jax.device_put(x, tokens), jax.device_put(w, NamedSharding(mesh, PRODUCTS[cut]))
    )
    exact = precision != "W4A8g32f" or cut != "rows"  # float scales of groups: float sums
    np.testing.assert_allclose(found, expected, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)
    for one, other in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "precision", "layers"),
    [
        ((1, 2), "W2A2", "o_proj"),
        ((2, 1), "W2A2", "o_proj"),
        ((1, 2), "W1A1", "^layers/"),
        ((1, 2), "W4A8g32", "^layers/"),
        ((2, 1), "W4A8g32", "^layers/"),
    ],
)
@pytest.mark.covered("test_products_have_the_bits_of_one_device; the plan, by the tests below")
def test_loss_and_gradients_are_those_of_one_device(shape, precision, layers):
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: student(precision, layers)), nnx.Param, ...)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), params)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    step = jax.jit(jax.value_and_grad(lambda params, ids: loss(nnx.merge(graph, params, rest), ids)))
    expected, gradients = step(params, ids)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=AUTO)
    cut = plan_training([nnx.merge(graph, params, rest)], mesh.shape)
    assert (len(cut.columns), len(cut.rows)) == ((6, 2) if shape[1] > 1 else (0, 0))

    def placed(path, leaf):
        name = "/".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        return jax.device_put(leaf, NamedSharding(mesh, cut.spec(name, leaf.ndim)))

    params = jax.tree_util.tree_map_with_path(placed, params)
    ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
    program = step.lower(params, ids).compile()
    found, ours = program(params, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (ours, gradients)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    exchanged = collectives(program)
    # Weights stay where they are: what is gathered is at most a number a token and head.
    assert not [shapes for kind, shapes in exchanged if kind == "all-gather" and "f32" in shapes]
    if shape[1] > 1 and layers == "^layers/":  # o and down forward, q, k, v, gate and up backward, of 16 tokens
        assert sum(shapes.count("[16,32]") for _, shapes in exchanged) == 7


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.covered("test_products_have_the_bits_of_one_device; and gradients, by ops/test_sharded_gradients.py")
def test_float_parameters_learn_beside_packed_weights(shape):
    """As adapters do: weights are packed and cut, and are not gathered for gradients either."""
    model = random_packed(CONFIG, bj.Precision.parse("W4A8g32"), key=jax.random.key(0), dtype=jnp.float32)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=AUTO)
    graph, *parts = nnx.split(model, nnx.Param, ...)
    _, *cut = nnx.split(place_model(model, mesh), nnx.Param, ...)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    step = jax.jit(jax.value_and_grad(lambda params, packed, ids: loss(nnx.merge(graph, params, packed), ids)))
    expected, gradients = step(*parts, ids)
    program = step.lower(*cut, jax.device_put(ids, NamedSharding(mesh, P("data")))).compile()
    found, ours = program(*cut, jax.device_put(ids, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (ours, gradients)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    assert {kind for kind, _ in collectives(program)} == {"all-reduce"}


def test_what_does_not_divide_is_whole_and_said():
    assert plan(2).columns == ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    assert plan(2).rows == ("o_proj", "down_proj")
    assert plan(2).spec("layers/ffn/down_proj/kernel", 3) == P(None, "model", None)
    assert plan(2).spec("layers/attention/q_proj/dot_general/step_size", 3) == P(None, "model", None)
    assert plan(2).spec("layers/attention/q_proj/bias", 2) == P(None, "model")
    assert plan(2).spec("embed/embedding", 2) == P(None, None)
    assert plan(2).moment_spec("layers/ffn/down_proj/kernel", (1, 128, 32)) == P(None, "model", "data")
    assert plan(2).moment_spec("embed/embedding", (48, 32)) == P("data", None)
    assert plan(2).moment_spec("final_norm/scale", (31,)) == P(None)
    assert str(plan(4, vocab_size=49)).splitlines() == [
        "2 x 4 devices (data, model); cut over model: gate_proj, up_proj, down_proj",
        "  attention whole on every device: 2 heads of keys and values do not divide over 4 devices",
        "  output layer whole on every device: 49 tokens do not divide over 4 devices",
    ]
    # A later stage with longer groups decides for the whole run.
    assert "k=128 of down_proj cannot be cut into 4 parts of a multiple of 64" in str(
        plan(4, "W4A8", "W4A8g64", num_heads=8, num_kv_heads=8)
    )


def test_impossible_meshes_are_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match="cannot be cut over 3 devices: attention .* 4 heads do not divide over 3 .* 128 c"
    ):
        plan(3)

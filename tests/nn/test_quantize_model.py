"""`quantize_model` replaces the layers that rules choose, and no others; errors of rules."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from bipolar_jax import TERNARY, GradientPrecision, Precision, quantization_aware, quantize_model
from bipolar_jax import nn as bnn
from bipolar_jax.compress.rounded_layers import RoundedLinear
from bipolar_jax.compress.site_inputs import Recorder

W4A8, W2A8, W8 = Precision(4, 8), Precision(2, 8), Precision(8)
EVERYTHING = [(".*", W4A8)]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.norm(self.up(x))))


class Model(nnx.Module):
    """Has a layer in every container of Flax."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.named = nnx.Dict(one=nnx.Linear(8, 8, rngs=rngs))
        self.chain = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 8, rngs=rngs))
        self.head = nnx.Linear(8, 10, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.chain(self.named["one"](x)))


IDS = jnp.array([[1, 2, 3], [9, 0, 9]])


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


def layers(model: Model) -> dict[str, nnx.Module]:
    found = {"embed": model.embed, "named/one": model.named["one"], "head": model.head}
    found |= {f"blocks/{i}/{name}": getattr(b, name) for i, b in enumerate(model.blocks) for name in ("up", "down")}
    return found | {f"chain/layers/{i}": model.chain.layers[i] for i in (0, 2)}


def test_layers_in_every_container_are_replaced(model):
    quantized = quantize_model(model, EVERYTHING)
    assert type(quantized) is Model
    for path, layer in layers(quantized).items():
        assert type(layer) is (bnn.Embed if path == "embed" else bnn.Linear), path
    assert type(quantized.blocks[0].norm) is nnx.RMSNorm
    logits = quantize_model(model, [(".*", W8)])(IDS)
    # 8-bit weights err by up to 1/255 of the largest; after 8 layers, logits of order 1 by a few percent.
    np.testing.assert_allclose(logits, model(IDS), atol=0.1)
    assert np.any(np.asarray(logits) != model(IDS))


def test_layers_in_plain_python_containers_are_replaced():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.data([nnx.Linear(8, 8, rngs=rngs)])

    assert type(quantize_model(Plain(nnx.Rngs(0)), EVERYTHING).layers[0]) is bnn.Linear


def test_the_first_rule_that_matches_decides(model):
    rules = [("blocks/0/up", W2A8), ("^head$|embed", None), ("up", W8), ("", W4A8)]
    quantized = layers(quantize_model(model, rules))
    assert quantized["blocks/0/up"].precision == W2A8
    assert quantized["blocks/1/up"].precision == W8
    assert quantized["blocks/0/down"].precision == quantized["chain/layers/2"].precision == W4A8
    assert type(quantized["head"]) is nnx.Linear
    assert type(quantized["embed"]) is nnx.Embed


def test_precisions_of_rules_may_be_texts(model):
    rules = [("blocks/0/up", "W2A8"), ("^embed", None), ("", "W1.58A16g4")]
    quantized = layers(quantize_model(model, rules))
    assert quantized["blocks/0/up"].precision == W2A8
    assert quantized["head"].precision == Precision(TERNARY, None, 4)


def test_the_original_is_not_changed(model):
    before = [(type(layer), id(layer)) for layer in layers(model).values()]
    logits = model(IDS)
    quantize_model(model, EVERYTHING)
    assert [(type(layer), id(layer)) for layer in layers(model).values()] == before
    np.testing.assert_array_equal(model(IDS), logits)


def test_layers_that_are_not_replaced_share_their_arrays(model):
    quantized = quantize_model(model, [("down", W4A8)])
    assert quantized.blocks[0].up.kernel[...] is model.blocks[0].up.kernel[...]
    assert quantized.blocks[0].norm.scale[...] is model.blocks[0].norm.scale[...]
    assert quantized.blocks[0].down.bias[...] is model.blocks[0].down.bias[...]


def test_an_empty_list_of_rules_changes_nothing(model):
    np.testing.assert_array_equal(quantize_model(model, [])(IDS), model(IDS))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(8, 8, rngs=rngs)
        self.b = self.a
        self.block = Block(rngs)
        self.again = self.block


@pytest.mark.parametrize("rules", [EVERYTHING, [("^a$", W4A8), ("^b$|up", W2A8)]])
def test_tied_layers_are_replaced_once_and_stay_tied(rules):
    quantized = quantize_model(Tied(nnx.Rngs(0)), rules)
    assert quantized.a is quantized.b
    assert quantized.a.precision == W4A8
    assert quantized.block is quantized.again
    assert type(quantized.block.up) is bnn.Linear


def test_a_rule_for_another_path_of_a_tied_layer_decides_nothing():
    with pytest.raises(ValueError, match=r"'\^b\$' decides no layer"):
        quantize_model(Tied(nnx.Rngs(0)), [("^a$", W4A8), ("^b$", W2A8)])


def test_layers_tied_and_excluded_stay_tied():
    quantized = quantize_model(Tied(nnx.Rngs(0)), [("^a$", None), ("up", W4A8)])
    assert quantized.a is quantized.b
    assert type(quantized.a) is nnx.Linear


def test_modules_may_refer_to_each_other():
    class Child(nnx.Module):
        def __init__(self, parent, rngs):
            self.parent = parent
            self.linear = nnx.Linear(8, 8, rngs=rngs)

    class Parent(nnx.Module):
        def __init__(self, rngs):
            self.child = Child(self, rngs)

    quantized = quantize_model(Parent(nnx.Rngs(0)), EVERYTHING)
    assert type(quantized.child.linear) is bnn.Linear
    assert quantized.child.parent is quantized


def test_layers_stacked_by_vmap_are_replaced_and_scanned():
    @nnx.vmap
    def make(rngs):
        return Block(rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
        return block(x)

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.blocks = make(rngs.split(3))

        def __call__(self, x):
            return forward(x, self.blocks)

    model = Stacked(nnx.Rngs(0))
    quantized = quantize_model(model, [("up|down", W8)])
    assert quantized.blocks.up.kernel.get_value().shape == (3, 8, 16)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(quantized(x), model(x), atol=0.2)  # 8-bit weights, outputs of order 3
    unstacked = quantize_model(nnx.merge(*nnx.split(model)), [("up|down", W8)])
    np.testing.assert_array_equal(
        unstacked.blocks.up.kernel.get_value().planes, quantized.blocks.up.kernel.get_value().planes
    )


def test_a_quantized_model_trains_its_parameters(model):
    quantized = quantize_model(model, EVERYTHING)
    optimizer = nnx.Optimizer(quantized, optax.adam(0.05), wrt=nnx.Param)
    packed = jax.tree.map(np.asarray, nnx.state(quantized, bnn.Packed))

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(IDS), IDS).mean()

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes
            optimizer.update(model, gradient)
        return value

    losses = [float(step(quantized, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(nnx.state(quantized, bnn.Packed)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_quantized_model_splits_merges_and_jits(model):
    quantized = quantize_model(model, EVERYTHING)
    logits = nnx.jit(lambda model: model(IDS))(quantized)
    merged = nnx.merge(*nnx.split(quantized))
    np.testing.assert_array_equal(nnx.jit(lambda model: model(IDS))(merged), logits)
    assert len(nnx.to_flat_state(nnx.state(quantized, bnn.Packed))) == len(layers(quantized))


def test_implementation_reaches_every_new_layer(model):
    quantized = quantize_model(model, EVERYTHING, implementation="reference")
    assert {layer.implementation for layer in layers(quantized).values()} == {"reference"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("blocks/0/uq", W4A8)], r"'blocks/0/uq' matches no layer; the nearest paths are blocks/0/up"),
        ([("norm", W4A8)], r"'norm' matches no layer"),
        (
            [(".*", W4A8), ("head", W8)],
            r"'head' decides no layer: the layers that it matches \(head\) are decided by earlier rules.*; move",
        ),
        ([("head", W4A8), ("head", None)], r"'head' decides no layer"),
        ([("(", W4A8)], r"'\(' is not a regular expression"),
        ({"head": W4A8}, r"rules must be a list of \(pattern, precision\) pairs.*got {'head'"),
        (zip(["head"], [W4A8], strict=True), r"rules must be a list of \(pattern, precision\) pairs.*got <zip"),
        (
            [("head", Precision(4, 8, group_size=9))],
            r"cannot quantize layer head to W4A8g9: .*contracted size 8, got 9",
        ),
    ],
)
def test_errors_of_rules(model, rules, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(model, rules)


@pytest.mark.parametrize("kind", [nnx.Linear, nnx.Embed])
def test_the_error_for_a_single_layer_names_from_float(kind):
    with pytest.raises(ValueError, match=rf"itself an {kind.__name__}.*nn\.{kind.__name__}\.from_float"):
        quantize_model(kind(8, 8, rngs=nnx.Rngs(0)), EVERYTHING)


def test_a_model_without_float_layers_raises():
    with pytest.raises(ValueError, match=r"the model has no nnx\.Linear, nnx\.LinearGeneral or nnx\.Embed"):
        quantize_model(nnx.RMSNorm(8, rngs=nnx.Rngs(0)), EVERYTHING)


def test_the_error_for_weights_with_nan_names_the_layer(model):
    broken = nnx.clone(model)
    broken.head.kernel[...] = broken.head.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"cannot quantize layer head to W4A8: .*1 NaN or Inf among its 80"):
        quantize_model(broken, [("head", W4A8)])


def test_what_is_missing_of_linen_models_is_named():
    layer, x = linen.Dense(4), jnp.ones((1, 8))
    variables = {"params": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r'the collection "params", as module.init returns it.*\[.bias., .kernel.\]'):
        quantize_model(layer, EVERYTHING, variables["params"], x)
    packed, packed_variables = quantize_model(layer, EVERYTHING, variables, x)
    with pytest.raises(ValueError, match="the model is packed already: give its float model"):
        quantize_model(packed, EVERYTHING, packed_variables, x)


def test_gradients_that_are_rounded_stochastically_need_rngs(model):
    with pytest.raises(ValueError, match=r"gradients of 8 bits are rounded stochastically: give rngs"):
        quantization_aware(model, [("head", "W2A4")], gradient=GradientPrecision(bits=8))


@pytest.mark.parametrize("layer", [nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed])
def test_layers_take_their_input_by_the_name_that_flax_gives_it(layer):
    """Models may call `self.up(inputs=x)`; so may they while they are calibrated."""
    stand_ins = {nnx.Einsum: [bnn.Einsum], nnx.Embed: [bnn.Embed]}.get(layer, [bnn.Linear, Recorder, RoundedLinear])
    names = {list(inspect.signature(each.__call__).parameters)[1] for each in (layer, *stand_ins)}
    assert len(names) == 1

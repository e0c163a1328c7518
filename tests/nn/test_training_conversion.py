"""Models trained with `DotGeneral` give the same bits when packed, in NNX and in linen; errors of conversion."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import bipolar_jax as bj
from bipolar_jax import nn as bnn
from bipolar_jax.ops import GradientPrecision
from tests.support.optimizations import optimizations
from tests.support.training import train

# Flax's attention, norms and pooling promote dtypes, and so does optax's Adam.
pytestmark = pytest.mark.usefixtures("standard_promotion")

W2A4, W4A8 = bj.Precision(2, 4), bj.Precision(4, 8)
X = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
noisy = nnx.initializers.normal(1.0)


class Model(nnx.Module):
    def __init__(self, rngs, dtype=None):
        self.up = nnx.Linear(24, 32, dtype=dtype, bias_init=noisy, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, dtype=dtype, decode=False, bias_init=noisy, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.pool = nnx.Conv(32, 32, (3,), rngs=rngs)
        self.down = nnx.LinearGeneral((32,), (3,), axis=(-1,), dtype=dtype, bias_init=noisy, rngs=rngs)

    def __call__(self, x):
        return self.down(self.norm(self.attention(jnp.tanh(self.up(x)))))


run = nnx.jit(lambda model, x: model(x))


@pytest.mark.parametrize(
    ("precision", "options", "dtype"),
    [
        (W2A4, {}, None),
        (W2A4, {}, jnp.bfloat16),
        (bj.Precision(4, 8, 8, "minmax"), {}, None),
        (bj.Precision(4, 8, 8, "minmax"), {}, jnp.bfloat16),
        (bj.Precision(3, None, None, "mse"), {}, None),
        (bj.Precision(3, None, None, "mse"), {}, jnp.bfloat16),
        (bj.Precision(bj.TERNARY, 8, None, "absmean"), {"weight_norm": "center"}, jnp.bfloat16),
        (bj.Precision(1, 1, None, "absmean"), {"weight_norm": "standardize", "clip_gradient": False}, None),
        (bj.Precision(1, 1, None, "absmean"), {"clip_activations": 1.0}, None),
        (bj.Precision(1, 1, None, "absmean"), {"clip_activations": 1.0}, jnp.bfloat16),
        (bj.Precision(2, 8, 8, scales="float"), {"learned_steps": True}, None),
        (bj.Precision(2, 8, 8, scales="float"), {"learned_steps": True}, jnp.bfloat16),
        (W2A4, {"gradient": GradientPrecision("bfloat16", 8), "rngs": nnx.Rngs(gradient=0)}, None),
    ],
    ids=[
        "W2A4",
        "W2A4 bf16",
        "W4A8g8 minmax",
        "W4A8g8 minmax bf16",
        "W3A16 mse",
        "W3A16 mse bf16",
        "W1.58A8 centered bf16",
        "W1A1 standardized",
        "W1A1 clipped",
        "W1A1 clipped bf16",
        "learned",
        "learned bf16",
        "8-bit gradients",
    ],
)
@pytest.mark.sample(1)
def test_nnx_outputs_are_the_same_to_the_bit(precision, options, dtype):
    model = bj.quantization_aware(Model(nnx.Rngs(0), dtype), [("up|down|attention", precision)], **options)
    train(model, X, Y, steps=3)
    packed = bj.quantize_model(model)
    assert type(packed.up) is type(packed.attention.query) is type(packed.down) is bnn.Linear
    assert packed.up.precision == precision
    ours, theirs = run(packed, X), run(model, X)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_training_moves_the_weights_and_lowers_the_loss():
    float_model = Model(nnx.Rngs(0))
    before = np.asarray(float_model.up.kernel[...])
    model = bj.quantization_aware(float_model, [("up|down|attention", W4A8)])
    losses = train(model, X, Y, steps=30)
    assert losses[-1] < 0.7 * losses[0]
    assert np.abs(np.asarray(model.up.kernel[...]) - before).max() > 1e-3
    np.testing.assert_array_equal(float_model.up.kernel[...], before)


def test_bits_can_change_between_steps():
    """Training continues with the same parameters at other bits, and finally in float."""
    model = bj.quantization_aware(Model(nnx.Rngs(0)), [("up|down", W4A8)])
    train(model, X, Y, steps=3)
    lower = bj.quantization_aware(model, [("up", W2A4)])
    assert lower.up.dot_general.precision == W2A4
    assert lower.down.dot_general.precision == W4A8
    lower = bj.quantization_aware(lower, [("up", W2A4)], learned_steps=True)
    assert type(lower.up.dot_general) is bnn.StatefulDotGeneral
    again = bj.quantization_aware(lower, [("up|down", None)])
    plain = Model(nnx.Rngs(0))
    nnx.update(plain, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(run(again, X), run(plain, X))


def test_stacked_layers_give_the_same_bits():
    @nnx.vmap
    def make(rngs):
        return nnx.LinearGeneral((4, 6), (4, 6), axis=(-2, -1), rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return jnp.tanh(layer(x))

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs.split(3))

        def __call__(self, x):
            return forward(x.reshape(2, 5, 4, 6), self.layers)

    model = bj.quantization_aware(Stacked(nnx.Rngs(0)), [("layers", W2A4)], learned_steps=True)
    packed = bj.quantize_model(model)
    assert packed.layers.kernel.get_value().shape == (3, 24, 24)
    np.testing.assert_array_equal(run(packed, X), run(model, X))


def test_layers_with_batch_axes_give_the_same_bits():
    layer = nnx.LinearGeneral((24,), (7, 2), axis=(-1,), batch_axis={0: 2}, bias_init=noisy, rngs=nnx.Rngs(0))
    layer.dot_general = bj.DotGeneral(2, 4)
    packed = bnn.Linear.from_float(layer)
    assert packed.kernel.get_value().shape == (2, 24, 14)
    np.testing.assert_array_equal(run(packed, X), run(layer, X))


def test_layers_that_were_not_trained_follow_the_rules():
    model = Model(nnx.Rngs(0))
    packed = bj.quantize_model(model, [("attention", W4A8), ("up", W2A4)])
    assert type(packed.attention.out) is bnn.Linear
    assert type(packed.up) is bnn.Linear
    assert type(packed.down) is nnx.LinearGeneral
    # Weights of few bits change outputs of order 1 by less than that.
    assert np.abs(run(packed, X) - run(model, X)).mean() < 0.5


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("pool", W4A8)], r"'pool' matches no layer that can be quantized, only pool \(Conv\): .*LinearGeneral"),
        ([("up", W4A8)], r"cannot quantize layer up to W4A8: it was trained at W2A4.*without rules"),
        ([("up", bj.Precision(2, 4, calibration="absmax"))], "trained at W2A4 with calibration 'mse', not 'absmax'"),
        ([("upp", W4A8)], "'upp' matches no layer; the nearest paths are up"),
        ([("up", "W4")], "rule 'up': precision 'W4' is not of the form W4A8.*None leaves layers float"),
        ([("up", 4)], "rule 'up': a precision must be a Precision or its text.*got 4"),
        (["up"], "a rule must be a pair of a pattern and a precision or None, got 'up'"),
    ],
)
def test_errors_of_rules(rules, message):
    model = bj.quantization_aware(Model(nnx.Rngs(0)), [("up", W2A4)])
    with pytest.raises(ValueError, match=message):
        bj.quantize_model(model, rules)


def test_without_rules_a_layer_must_have_been_trained():
    with pytest.raises(ValueError, match="no layer of the model was trained with DotGeneral, so rules must say"):
        bj.quantize_model(Model(nnx.Rngs(0)))


def test_a_kernel_trained_as_activations_is_refused():
    layer = nnx.Linear(8, 8, dot_general=bj.DotGeneral(2, 4, weights="lhs"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="weights='lhs'.*trained as activations"):
        bnn.Linear.from_float(layer)


@pytest.mark.parametrize("model", [jnp.ones(3), None])
@pytest.mark.parametrize("convert", [bj.quantize_model, bj.quantization_aware])
def test_only_modules_are_accepted(convert, model):
    with pytest.raises(ValueError, match="give an nnx.Module (and rules, or a linen.Module|with paths for rules)"):
        convert(model, [])


# Linen


def initialized(model: linen.Module, *args, **options):
    """The model's initial variables, from one jitted program."""
    with optimizations(False):
        return jax.jit(functools.partial(model.init, **options))(jax.random.key(0), *args)


class CNN(linen.Module):
    """The dense layers are quantized. Convolutions stay float, because linen.Conv takes no dot_general."""

    dot_general: object = None

    @linen.compact
    def __call__(self, x, train=True):
        x = linen.max_pool(linen.relu(linen.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = linen.relu(linen.Dense(16, dot_general=self.dot_general)(x.reshape(x.shape[0], -1)))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(3, dot_general=self.dot_general)(x)


class Transformer(linen.Module):
    """Passes a `DotGeneral` to linen layers in every way that they offer."""

    dtype: object = None

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(16, dtype=self.dtype, dot_general=bj.DotGeneral(2, 4), bias_init=noisy, name="up")(x)
        x = linen.MultiHeadDotProductAttention(
            4,
            dtype=self.dtype,
            qkv_dot_general=bj.DotGeneral(4, 8, 8, "minmax"),
            out_dot_general_cls=functools.partial(
                bnn.LinenDotGeneral, bj.DotGeneral(bj.TERNARY, 8), learned_steps=True
            ),
            name="attention",
        )(x)
        x = linen.DenseGeneral(
            (2, 3),
            dtype=self.dtype,
            dot_general_cls=functools.partial(bj.DotGeneral, 1, 8, calibration="absmean", weight_norm="center"),
            name="down",
        )(linen.LayerNorm()(x))
        return linen.Dense(3, name="head")(x)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.sample(1)
def test_linen_outputs_are_the_same(dtype, tmp_path):
    model = Transformer(dtype)
    variables = initialized(model, X)
    with optimizations(False):
        gradient = jax.jit(jax.grad(lambda v: jnp.mean(model.apply(v, X) ** 2)))(variables)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["params"]["up"]))
    variables = jax.tree.map(lambda v, g: v - 0.1 * g, variables, gradient)
    kernel = variables["params"]["up"]["kernel"]

    packed_model, packed = bj.quantize_model(model, None, variables, X)
    assert variables["params"]["up"]["kernel"] is kernel  # not changed
    assert [path for path, _ in packed_model.layers] == [
        "up",
        *(f"attention/{name}" for name in ("query", "key", "value", "out")),
        "down",
    ]
    assert set(packed["params"]["attention"]["out"]) == {"kernel", "bias"}  # no step size
    assert not isinstance(packed["params"]["head"]["kernel"], bj.BipolarArray)
    apply = jax.jit(packed_model.apply)
    ours, theirs = apply(packed, X), jax.jit(model.apply)(variables, X)
    assert ours.dtype == theirs.dtype
    # To the bit but for float softmax and norms, which XLA fuses with other neighbours. A changed code would show.
    ours, theirs = (np.asarray(outputs, np.float32) for outputs in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7 if dtype is None else 0)
    bj.save(tmp_path / "packed.safetensors", packed)
    np.testing.assert_array_equal(np.asarray(apply(bj.load(tmp_path / "packed.safetensors"), X), np.float32), ours)


def test_the_dense_layers_of_a_linen_cnn_train_and_convert():
    images = np.random.default_rng(0).normal(size=(12, 8, 8, 1)).astype(np.float32)
    labels = np.arange(12) % 3
    model = CNN(bj.DotGeneral(1, 2, calibration="absmean"))
    variables = initialized(model, images, train=False)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state, key):
        def loss(variables):
            logits = model.apply(variables, images, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    losses = []
    with optimizations(False):
        state = jax.jit(optimizer.init)(variables)
        for i in range(60):
            variables, state, value = step(variables, state, jax.random.key(i))
            losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    packed_model, packed = bj.quantize_model(model, None, variables, images, train=False)
    evaluate = lambda apply, v: jax.jit(functools.partial(apply, train=False))(v, images)  # noqa: E731
    np.testing.assert_array_equal(evaluate(packed_model.apply, packed), evaluate(model.apply, variables))
    assert [path for path, _ in packed_model.layers] == ["Dense_0", "Dense_1"]


@pytest.fixture(scope="module")
def cnn_variables():
    return initialized(CNN(), jnp.ones((2, 8, 8, 1)), train=False)


def test_a_plain_linen_model_is_quantized_by_rules(cnn_variables):
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    model, packed = bj.quantize_model(
        CNN(), [("Dense_1", None), ("Dense", bj.Precision(8, 8))], cnn_variables, images, train=False
    )
    assert [path for path, _ in model.layers] == ["Dense_0"]
    np.testing.assert_allclose(
        model.apply(packed, images, train=False), CNN().apply(cnn_variables, images, train=False), atol=0.05
    )


def test_scanned_linen_layers_give_the_same_bits():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return jnp.tanh(linen.Dense(24, dot_general=bj.DotGeneral(2, 4))(x)), None

    stack = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = initialized(stack, X, None)
    model, packed = bj.quantize_model(stack, None, variables, X, None)
    assert packed["params"]["Dense_0"]["kernel"].shape == (3, 24, 24)
    ours, theirs = (jax.jit(apply)(v, X, None)[0] for apply, v in ((model.apply, packed), (stack.apply, variables)))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (None, "no layer of the model was trained with DotGeneral"),
        ([("Conv", W4A8)], r"'Conv' matches no layer that can be quantized, only Conv_0 \(Conv\): .*linen\.Dense"),
        ([("Dens_0", W4A8)], "'Dens_0' matches no layer; the nearest paths are Dense_0"),
        ([("Dense_1", bj.Precision(4, 8, 99))], "cannot quantize layer Dense_1 to W4A8g99: .*contracted size 16"),
    ],
)
def test_errors_of_rules_for_linen_models(rules, message, cnn_variables):
    with pytest.raises(ValueError, match=message):
        bj.quantize_model(CNN(), rules, cnn_variables, jnp.ones((2, 8, 8, 1)), train=False)


def test_packed_linen_models_nest_and_bind():
    """Two packed models are submodules of another; their variables stand under their names."""
    model = TwoLayers()
    variables = initialized(model, X)
    packed, packed_variables = bj.quantize_model(model, [(".*", W4A8)], variables, X)
    expected = packed.apply(packed_variables, X)
    bound = packed.bind(packed_variables)
    np.testing.assert_array_equal(bound(X), expected)
    np.testing.assert_array_equal(bound(X, method="hidden"), packed.apply(packed_variables, X, method="hidden"))
    chain = linen.Sequential([packed, linen.Dense(24), packed.clone()])
    dense = initialized(linen.Dense(24), jnp.ones((2, 5, 3)))["params"]
    nested = {"layers_0": packed_variables["params"], "layers_1": dense, "layers_2": packed_variables["params"]}
    y = jax.jit(chain.apply)({"params": nested}, X)
    between = linen.Dense(24).apply({"params": dense}, expected)
    np.testing.assert_allclose(y, packed.apply(packed_variables, between), atol=0.05)  # one 8-bit step of a token


class TwoLayers(linen.Module):
    def setup(self):
        self.first, self.second = linen.Dense(8), linen.Dense(3)

    def __call__(self, x):
        return self.second(self.hidden(x))

    def hidden(self, x):
        return linen.relu(self.first(x))


def doubled(features):
    double = functools.partial(jax.tree.map, lambda leaf: 2 * leaf)
    return linen.map_variables(linen.Dense, "params", double, init=True)(features)


WRAPPERS = {
    "doubled": (doubled, {}),
    "WeightNorm": (lambda features: linen.WeightNorm(linen.Dense(features)), {}),
    "SpectralNorm": (lambda features: linen.SpectralNorm(linen.Dense(features)), {"update_stats": False}),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_linen_wrappers_that_compute_with_kernels_are_refused(name):
    make, options = WRAPPERS[name]

    class Wrapped(linen.Module):
        @linen.compact
        def __call__(self, x):
            return make(4)(linen.Dense(8, name="first")(x), **options)

    variables = initialized(Wrapped(), X)
    with pytest.raises(ValueError, match=r"layer \w*Dense_0: the model computes with its kernel before"):
        bj.quantize_model(Wrapped(), [(".*", W4A8)], variables, X)
    model, packed = bj.quantize_model(Wrapped(), [("first", W4A8)], variables, X)
    assert model.apply(packed, X).shape == (2, 5, 4)


def test_a_linen_model_needs_its_variables():
    with pytest.raises(ValueError, match="CNN is a linen model: give its variables and example inputs"):
        bj.quantize_model(CNN(), [(".*", W4A8)])

"""Layers of other kinds: einsums and layers in other pytrees are packed, what stays float is said and listed."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import bipolar_jax as bj
from bipolar_jax import nn as bnn
from tests.support.integer_products import normal

EVERYTHING = [(".*", "W8A8")]
noisy = nnx.initializers.normal(1.0)


class Box(nnx.Pytree):
    def __init__(self, rngs):
        self.inner = nnx.Linear(8, 8, rngs=rngs)


class Subclass(nnx.Linear):
    pass


class Adapted(nnx.Module):
    """Has layers that are packed, and one of every kind that stays float."""

    def __init__(self, rngs):
        self.box = Box(rngs)
        self.einsum = nnx.Einsum("...d,dhk->...hk", (8, 2, 4), (2, 4), rngs=rngs)
        self.lora = nnx.LoRA(8, 2, 8, base_module=nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.called = nnx.Einsum("ab,bc->c", (8, 2), rngs=rngs)
        self.lora_linear = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
        self.subclass = Subclass(8, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.own = nnx.data({"weights": nnx.Param(jnp.ones((8, 8)))})


@pytest.fixture(scope="module")
def quantized():
    with pytest.warns(UserWarning, match="stay float") as caught:
        model = bj.quantize_model(Adapted(nnx.Rngs(0)), EVERYTHING)
    return model, [str(each.message) for each in caught]


def test_layers_in_other_pytrees_and_adapters_are_packed(quantized):
    model, _ = quantized
    assert type(model.box.inner) is type(model.lora.base_module) is bnn.Linear
    assert type(model.einsum) is bnn.Einsum
    assert type(model.lora_linear) is nnx.LoRALinear
    x = normal(3, 8)
    np.testing.assert_allclose(model.lora(x), Adapted(nnx.Rngs(0)).lora(x), atol=0.05)


def test_one_warning_says_what_stays_float(quantized):
    """Without biases: 16 + 64 + 32 + 192 + 64 + 32 + 64 numbers of 4 bytes."""
    _, messages = quantized
    assert len(messages) == 1
    assert messages[0].startswith("7 layers that rules match stay float, 1.8 KB: ")
    for part in ("the model itself (Adapted)", "lora (LoRA)", "'ab,bc->c' does not plainly contract", "and 2 more"):
        assert part in messages[0]


def test_layers_that_rules_leave_out_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bj.quantize_model(Adapted(nnx.Rngs(0)), [("box|einsum|lora/base", "W4A8")])
        bj.quantize_model(Adapted(nnx.Rngs(0)), [("lora|called|conv|subclass|^$", None), (".*", "W4A8")])


def test_linen_layers_that_stay_float_are_said():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4)(linen.LayerNorm()(linen.Conv(4, (3,))(x)))

    x = jnp.ones((2, 8, 4))
    variables = Model().init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match=r"^1 layer that rules match stays float, 192 B: Conv_0 \(Conv\)"):
        bj.quantize_model(Model(), EVERYTHING, variables, x)


def test_summary_lists_every_layer(quantized, capsys):
    model, _ = quantized
    bj.summary(model)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["layer"] == ["layer", "class", "precision", "parameters", "bytes"]
    assert lines["box/inner"] == ["box/inner", "Linear", "W8A8", "72", "384", "B"]
    assert lines["conv"][1:] == ["Conv", "float32", "200", "800", "B", "not", "packed:", "Conv"]
    assert lines["subclass"][-1] == "nnx.Linear"
    assert lines["norm"][-4:] == ["no", "weights", "to", "pack"]
    assert lines["3"] == ["3", "packed", "216", "1.1", "KB"]
    assert lines["8"] == ["8", "float", "504", "2.0", "KB"]
    notes = {layer.path: layer.note for layer in bnn.layer_summaries(Adapted(nnx.Rngs(0)))}
    assert notes["box/inner"] == notes["einsum"] == "no rule has chosen it"
    layers = nnx.Sequential(nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    clipped = bj.quantize_model(layers, [("", bj.Precision(4, 4, a_span=0.85))])
    (layer,) = bnn.layer_summaries(clipped)
    assert layer.is_packed
    assert layer.note == "tokens are clipped to 0.85 of their range"
    with pytest.raises(ValueError, match="give an nnx.Module"):
        bj.summary(jnp.ones(3))


def test_a_layer_in_a_frozen_container_raises():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        layer: nnx.Linear

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.frozen = nnx.data(Frozen(nnx.Linear(8, 8, rngs=rngs)))

    with pytest.raises(ValueError, match="frozen/layer is in a Frozen, where it cannot be replaced"):
        bj.quantize_model(Model(nnx.Rngs(0)), EVERYTHING)


def test_a_stack_on_another_axis_is_refused_by_its_path():
    @nnx.vmap(out_axes=1)
    def make(rngs):
        return nnx.Dict(up=nnx.Linear(8, 16, rngs=rngs))

    with pytest.raises(ValueError, match=r"cannot quantize layer up to W8A8: .*must be the first"):
        bj.quantize_model(make(nnx.Rngs(0).split(3)), EVERYTHING)


# Einsums

EQUATIONS = [
    ("btd,ndh->btnh", (3, 5, 8), (2, 8, 4), (2, 4)),
    ("bsd,ckdh->cbskh", (3, 5, 8), (2, 3, 8, 4), (2, 3, 4)),
    ("btnh,nhd->btd", (3, 5, 2, 4), (2, 4, 8), (8,)),
    ("...hn,nhd->...d", (3, 4, 2), (2, 4, 8), None),
    ("nta,hab->nthb", (3, 5, 2), (8, 2, 4), (8, 4)),
    ("ebk,ekn->bne", (2, 5, 8), (2, 8, 4), None),
]


@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
@pytest.mark.parametrize(("equation", "x_shape", "kernel_shape", "bias_shape"), EQUATIONS)
@pytest.mark.sample(2)
@pytest.mark.usefixtures("standard_promotion")  # bfloat16 inputs of float32 layers
@pytest.mark.sample(2)
def test_an_einsum_that_contracts_its_kernel_is_packed(equation, x_shape, kernel_shape, bias_shape, trained):
    options = {"einsum_op": bnn.QuantizedEinsum(bj.DotGeneral(2, 4, 2))} if trained else {}
    layer = nnx.Einsum(equation, kernel_shape, bias_shape, bias_init=noisy, rngs=nnx.Rngs(0), **options)
    packed = bj.quantize_model(nnx.Dict(layer=layer), None if trained else EVERYTHING)["layer"]
    assert packed.precision == (bj.Precision(2, 4, 2) if trained else bj.Precision(8, 8))
    x = jnp.asarray(normal(*x_shape))
    if trained:
        run = nnx.jit(lambda layer, x: layer(x))
        np.testing.assert_array_equal(run(packed, x), run(layer, x))
    else:
        np.testing.assert_allclose(packed(x), layer(x), atol=0.15)  # 8-bit numbers, sums of order 1
    for dtype in (jnp.float32, jnp.bfloat16):
        assert packed(x.astype(dtype)).dtype == layer(x.astype(dtype)).dtype


def test_a_stack_of_einsums_is_packed():
    stack = nnx.vmap(lambda rngs: nnx.Einsum("bd,ndh->bnh", (2, 8, 4), rngs=rngs))(nnx.Rngs(0).split(3))
    packed = bnn.Einsum.from_float(stack, "W8A8")
    assert packed.kernel.get_value().shape == (3, 8, 8)
    x = jnp.asarray(normal(5, 8))
    forward = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    np.testing.assert_allclose(forward(packed, x), forward(stack, x), atol=0.1)


@pytest.mark.parametrize(
    ("equation", "kernel_shape", "options", "message"),
    [
        ("ab,bc->c", (8, 2), {}, "does not plainly contract"),
        ("ab,ab->ab", (8, 2), {}, "does not plainly contract"),
        ("ab,bcd->ac", (8, 2, 2), {}, "does not plainly contract"),
        ("...b,...bc->...c", (3, 8, 2), {}, "does not plainly contract"),
        ("ab,bc->ac", (8, 2), {"einsum_op": np.einsum}, "its einsum_op is einsum"),
    ],
)
def test_other_einsums_stay_float_and_are_said(equation, kernel_shape, options, message):
    layer = nnx.Einsum(equation, kernel_shape, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=message):
        bnn.Einsum.from_float(layer, "W8A8")
    model = nnx.Dict(einsum=layer, tied=layer, linear=nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    with pytest.warns(UserWarning, match=message):
        model = bj.quantize_model(model, EVERYTHING)
    assert type(model["einsum"]) is nnx.Einsum
    assert model["tied"] is model["einsum"]


def test_a_packed_einsum_takes_no_other_equation():
    layer = bnn.Einsum.from_float(nnx.Einsum("ab,bc->ac", (8, 2), rngs=nnx.Rngs(0)), "W8A8")
    with pytest.raises(ValueError, match="packed for 'ab,bc->ac'"):
        layer(jnp.ones((2, 8)), "ba,bc->ac")

"""bipolar_jax.interop.rules_from_qwix: the layers and precisions that qwix's rules choose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.interop import rules_from_qwix
from bipolar_jax.nn import layer_summaries

qwix = pytest.importorskip("qwix", reason="qwix is not installed")
Rule = qwix.QuantizationRule


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight_qtype": jnp.int4}, bj.Precision(4, calibration="minmax")),
        ({"weight_qtype": "int3", "tile_size": 8}, bj.Precision(3, None, 8, "minmax", "float")),
        ({"weight_qtype": jnp.int8, "act_qtype": jnp.int8}, bj.Precision(8, 8, calibration="minmax", a_symmetric=True)),
        (
            {"weight_qtype": "int4", "act_qtype": "int8", "act_calibration_method": "minmax,0.9"},
            bj.Precision(4, 8, calibration="minmax", a_span=0.9),
        ),
        ({}, None),
    ],
)
def test_precisions(fields, expected):
    assert rules_from_qwix([Rule(module_path="a/b", **fields)]) == [(r"\A(?:a/b)\Z", expected)]


def test_the_same_layers_are_chosen():
    """Of a model of three layers: whole paths, the first match; rules of other operations are left out."""
    model = nnx.Sequential(*(nnx.Linear(16, 8, rngs=nnx.Rngs(i)) for i in range(3)))
    rules = [
        Rule(module_path="layers/1", op_names=("conv_general_dilated",), weight_qtype=jnp.int4),
        Rule(module_path="layers/0"),
        Rule(module_path="layers/.*", weight_qtype=jnp.int4, act_qtype=jnp.int8, tile_size=8),
    ]
    quantized = bj.quantize_model(model, rules_from_qwix(rules))
    chosen = {layer.path: layer.precision for layer in layer_summaries(quantized)}
    assert chosen == {"layers/0": "float32", "layers/1": "W4A8sg8f", "layers/2": "W4A8sg8f"}
    with pytest.raises(ValueError, match="matches no layer"):  # no whole path
        bj.quantize_model(model, rules_from_qwix([Rule(module_path="layers", weight_qtype=jnp.int8)]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_a_layer_that_qwix_quantized_computes_the_same(method):
    """Tokens and weights of the same integers; `bj.nn.Linear` with the layer's kernel and the rule's precision."""
    model = nnx.Sequential(nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (64, 32)) - 0.3
    rule = Rule(weight_qtype=jnp.int4, act_qtype=jnp.int8, act_calibration_method=method)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = qwix.quantize_model(model, qwix.PtqProvider([rule]), x)
        expected = np.asarray(theirs(x))
    ((_, precision),) = rules_from_qwix([rule])
    kernel = bj.from_qwix(theirs.layers[0].kernel)
    layer = bj.nn.Linear(32, 8, precision=precision, use_bias=False, kernel=kernel)
    difference = np.abs(np.asarray(layer(x)) - expected).max(axis=1)
    # "absmax" makes a tie of a token's largest magnitude, which is rounded up here and to even there.
    assert np.mean(difference < 1e-5 * np.abs(expected).max()) > 0.8
    assert difference.max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_qtype": "nf4"}, "nf4 is no type of integers"),
        ({"weight_qtype": jnp.int8, "act_qtype": jnp.float8_e4m3fn}, "float8_e4m3fn is no type of integers"),
        ({"weight_qtype": jnp.int4, "tile_size": 0.25}, "tile_size is the fraction 0.25"),
        ({"weight_qtype": jnp.int4, "weight_calibration_method": "rms,3"}, "weight_calibration_method is 'rms,3'"),
        ({"weight_qtype": jnp.int4, "weight_calibration_method": "absmax,0.8"}, "weights are clipped"),
        ({"weight_qtype": jnp.int4, "act_qtype": jnp.int8, "act_static_scale": True}, "of each token here"),
        ({"weight_qtype": jnp.int4, "op_names": ("einsum",)}, "one of einsum alone"),
        ({"module_path": "(?i)a"}, r"write them as \(\?i:"),
    ],
)
def test_rules_without_a_counterpart_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"qwix's rule of module_path .*{message}"):
        rules_from_qwix([Rule(**{"module_path": "a"} | fields)])
    with pytest.raises(ValueError, match="takes qwix.QuantizationRule, got tuple"):
        rules_from_qwix([("a", "W4A8")])


def test_rules_of_training_are_taken_without_gradients():
    fields = {"module_path": "a", "weight_qtype": jnp.int4, "act_qtype": jnp.int8}
    assert rules_from_qwix([qwix.QtRule(**fields)]) == rules_from_qwix([Rule(**fields)])
    with pytest.raises(ValueError, match="bwd_qtype is int8, and rules here say nothing of gradients: leave it out"):
        rules_from_qwix([qwix.QtRule(**fields, bwd_qtype="int8")])

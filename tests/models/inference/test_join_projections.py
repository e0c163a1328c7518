"""Layers of the same input joined into one: the same numbers from fewer products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Linear, fuses, joined
from bipolar_jax.ops import Activation, LayerNorm, RMSNorm

SIZES = {"vocab_size": 50, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12}


def make(rules, **fields) -> Transformer:
    config = TransformerConfig(**SIZES, ffn_size=72, context_length=64, **fields)
    return bj.quantize_model(Transformer(config, rngs=nnx.Rngs(0)), rules)


def products(model: Transformer) -> set[str]:
    return {str(path[-1]) for path, layer in nnx.iter_modules(model) if isinstance(layer, Linear)}


@pytest.mark.parametrize(
    ("precision", "fields"),
    [("W4A8", {}), ("W2A2g16", {"qkv_bias": True}), ("W1.58A8", {"ffn": "gelu", "positions": "alibi"})],
)
@pytest.mark.covered("test_prepare.py")
def test_joined_models_give_the_same_numbers(precision, fields):
    model = make([(".*_proj", bj.Precision.parse(precision))], **fields)
    whole = join_projections(model)
    swiglu = "ffn" not in fields
    assert products(whole) == {"qkv_proj", "o_proj", "down_proj", "gate_up_proj" if swiglu else "up_proj"}
    assert {"q_proj", "k_proj", "v_proj"} <= products(model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    lengths = jnp.array([9, 4])
    run = jax.jit(lambda model: model.prefill(ids, lengths, 16))
    (logits, cache), (expected, expected_cache) = run(whole), run(model)
    # XLA fuses slices of the joined heads with attention's float32 sums, whose order changes.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6)
    step = jax.jit(lambda model, cache: model.decode(ids[:, 0], cache)[0])
    np.testing.assert_allclose(step(whole, cache), step(model, expected_cache), rtol=0, atol=2e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6), cache, expected_cache)


@pytest.mark.parametrize("clip", [None, 4.0])
@pytest.mark.covered("nn/test_nn_layers.py, layer by layer; joined models, by the tests beside")
def test_models_trained_with_dot_general_join_and_fuse_unless_they_clip(clip):
    model = bj.quantization_aware(make([]), [(".*_proj", "W4A8")], clip_activations=clip)
    packed = bj.quantize_model(model)
    whole = join_projections(packed)
    assert products(whole) == {"qkv_proj", "o_proj", "down_proj", "gate_up_proj"}
    layers = [layer for _, layer in nnx.iter_modules(whole) if isinstance(layer, Linear)]
    assert {fuses(layer) for layer in layers} == {clip is None}
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    run = jax.jit(lambda model: model(ids))
    # Numbers that training rounds on the way differ in the last bits, which may flip an 8-bit step.
    np.testing.assert_allclose(run(whole), run(packed), atol=0.05)


@pytest.mark.parametrize("joined_first", [False, True])
@pytest.mark.parametrize("fields", [{}, {"ffn": "gelu", "norm": "layer"}, {"ffn": "relu", "norm": "layer"}])
@pytest.mark.sample(1)
def test_norms_and_activation_functions_are_computed_while_packed_layers_quantize(joined_first, fields, monkeypatch):
    model = make([(".*_proj", bj.Precision.parse("W4A8"))], **fields)
    model = join_projections(model) if joined_first else model
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    found = jax.jit(lambda model: model(ids))(model)
    prologues, call = [], Linear.__call__

    def one_after_the_other(self, x, prologue=None, residual=None):
        prologues.append(prologue)
        return call(self, x if prologue is None else prologue(x).astype(x.dtype), residual=residual)

    monkeypatch.setattr(Linear, "__call__", one_after_the_other)
    jax.clear_caches()  # programs of the model were traced with the layer's own call
    expected = jax.jit(lambda model: model(ids))(model)
    monkeypatch.undo()
    jax.clear_caches()
    norms = [p for p in prologues if isinstance(p, RMSNorm | LayerNorm)]
    functions = [p for p in prologues if isinstance(p, Activation)]
    swiglu = not fields
    assert len(norms) == (2 if joined_first else 5 if swiglu else 4)
    assert len(functions) == (1 if joined_first or not swiglu else 0)
    # The same in float32 but for the last bits, which may turn what is nearly a tie of 8 bits.
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_layers_of_other_precisions_stay_by_themselves():
    rules = [(".*v_proj", bj.Precision(w_bits=8, a_bits=8)), (".*_proj", bj.Precision(w_bits=4, a_bits=8))]
    model = join_projections(make(rules))
    assert products(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_float_models_stay_as_they_are():
    model = join_projections(Transformer(TransformerConfig(**SIZES, ffn_size=72, context_length=64), rngs=nnx.Rngs(0)))
    assert hasattr(model.layers.attention, "q_proj")
    assert hasattr(model.layers.ffn, "gate_proj")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"precision": bj.Precision(w_bits=2, a_bits=8)}, "precision is W4A8 in one and W2A8 in another"),
        ({"use_bias": False}, "bias is True in one and False in another"),
        ({"implementation": "xla"}, "backend is auto in one and xla in another"),
        ({"in_features": 16}, "contracted size is 32 in one and 16 in another"),
    ],
)
def test_layers_that_differ_are_refused(other, message):
    fields = {"in_features": 32, "out_features": 8, "precision": bj.Precision(w_bits=4, a_bits=8), "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=message):
        joined([Linear(**fields), Linear(**fields | other)])

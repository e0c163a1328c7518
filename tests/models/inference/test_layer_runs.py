"""Layers of one model at several precisions: runs of equal layers, from rules to files and generated text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.nn import Linear
from bipolar_jax.nn.compressible import Layered, layer_at, run_name, run_of_name
from tests.support.tiny_checkpoints import make_tokenizer
from tests.support.tiny_transformers import ARCHITECTURES, CONFIG, random_ids, random_transformer

TOKENIZER = make_tokenizer("smollm")
RULES = [("layers/0-1/ffn/down_proj", "W6A8"), ("layers/2/attention/o_proj", None), ("^layers/", "W4A8")]


def precision_of(block, path):
    return str(layer_at(block, path).precision)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def model():
    return random_transformer(dataclasses.replace(CONFIG, vocab_size=TOKENIZER.get_vocab_size()))


@pytest.fixture(scope="module")
def packed(model):
    return bj.quantize_model(model, RULES)


def test_rules_cut_the_stack_where_layers_begin_to_differ(model, packed, capsys):
    assert isinstance(model, Layered)
    assert (model.runs, packed.runs) == ((range(3),), (range(2), range(2, 3)))
    assert [precision_of(packed.block(i), "ffn/down_proj") for i in range(3)] == ["W6A8", "W6A8", "W4A8"]
    assert isinstance(packed.block(2).attention.o_proj, nnx.Linear)
    bj.summary(packed)
    assert "layers/0-1/ffn/down_proj  " in capsys.readouterr().out
    assert [run_of_name(run_name(run)) for run in packed.runs] == list(packed.runs)
    assert model.with_runs([range(1), range(1, 3)]).runs == (range(1), range(1, 3))
    for runs in ([range(2)], [range(1, 3), range(1)]):
        with pytest.raises(ValueError, match="cannot be cut into"):
            model.with_runs(runs)
    with pytest.raises(ValueError, match=r"\['0-1', '2'\] cannot be cut"):
        packed.with_runs([range(3)])
    with pytest.raises(ValueError, match="rule 'layers/7/' matches no layer; the nearest paths are"):
        bj.quantize_model(model, [("layers/7/", "W4A8")])


@pytest.mark.covered("prepared models of runs, by a test below; calibrated ones, by experiments/test_allocate.py")
def test_a_model_of_runs_computes_what_its_layers_compute(model, packed):
    """Its layers one after the other; and decoding as whole texts."""
    alone = Linear.from_float(model.block(1).ffn.down_proj, "W6A8").kernel.get_value()
    assert_same(packed.block(1).ffn.down_proj.kernel.get_value(), alone)
    blocks = [packed.block(index) for index in range(3)]
    assert_same(model.with_blocks(blocks), packed)
    ids = random_ids(1, 7)
    carry, run = packed.enter_blocks(ids), jax.jit(type(packed).run_block)
    for block in blocks:
        carry = run(packed, block, carry)
    whole = packed(ids)
    limit = 2e-2 * np.abs(whole).max()  # a number may round to the next step of a quantizer
    np.testing.assert_allclose(packed.predict(carry), whole, rtol=0, atol=limit)
    logits, cache = packed.prefill(ids[:, :6], jnp.array([6]), 8)
    np.testing.assert_allclose(logits, whole[:, 5], rtol=0, atol=limit)
    logits, cache = packed.decode(ids[:, 6], cache)
    np.testing.assert_allclose(logits, whole[:, 6], rtol=0, atol=limit)


def test_prepared_models_of_runs_compute_the_same_and_explain_every_run(packed):
    prepared = bj.models.prepare_for_inference(packed)
    assert prepared.runs == packed.runs
    assert hasattr(prepared.layers["0-1"].attention, "qkv_proj")
    ids = random_ids(1, 7)
    expected = packed(ids)
    np.testing.assert_allclose(prepared(ids), expected, rtol=0, atol=2e-2 * np.abs(expected).max())
    table = str(bj.explain_model(prepared, 1, 8)).splitlines()
    assert next(line.split()[1:4] for line in table if line.startswith("decode")) == ["layers", "0-1", "qkv"]
    assert sum(line.startswith("prefill  layer 2") for line in table) > 3


@pytest.mark.parametrize("bits", [None, 4])
def test_files_keep_runs(packed, tmp_path, bits):
    save_model(tmp_path / "model.safetensors", PretrainedModel(packed, TOKENIZER, None))
    loaded = load_model(tmp_path / "model.safetensors", bits).model
    assert loaded.runs == packed.runs
    assert precision_of(loaded.block(0), "ffn/down_proj") == ("W6A8" if bits is None else "W4A8")
    if bits is None:
        assert_same(loaded, packed)


@pytest.mark.covered("tests/compress/test_calibrate.py and the tests of files beside it")
def test_calibration_gives_every_layer_its_own_precision_and_resumes(tmp_path):
    model = bj.compress.rotate(random_transformer(ARCHITECTURES["opt"]), key=jax.random.key(0))
    method, tokens = Rounding("nearest"), random_ids(4, 8)
    rules = [("layers/0/ffn", "W6A8"), *RULES[1:], ("embed", "W8A16")]
    packed = bj.compress.calibrate(model, tokens, rules, method=method, store=tmp_path)
    assert packed.runs == (range(1), range(1, 2), range(2, 3))
    found = [precision_of(packed.block(index), "ffn/down_proj") for index in range(3)]
    assert found == ["W6A8", "W4A8", "W4A8"]
    assert not isinstance(packed.embed, nnx.Embed)
    again = bj.compress.calibrate(model, tokens, rules, method=method, store=tmp_path)
    assert_same(again, packed)

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


def test_a_model_of_runs_computes_what_its_layers_compute(model, packed):
    """Against layers of models that are one stack each, one after the other; and decoding against whole texts."""
    wide, narrow = (bj.quantize_model(model, [("^layers/", each)]) for each in ("W6A8", "W4A8"))
    blocks = [narrow.block(index) for index in range(3)]
    for index in (0, 1):
        blocks[index].ffn.down_proj = wide.block(index).ffn.down_proj
    blocks[2].attention.o_proj = model.block(2).attention.o_proj
    ids = random_ids(2, 7)
    carry = model.enter_blocks(ids)
    for block in blocks:
        carry = jax.jit(type(model).run_block)(model, block, carry)
    expected = model.leave_blocks(model.stream(carry))
    found = packed.hidden_states(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * np.abs(expected).max())
    same = model.with_blocks(blocks)
    assert same.runs == packed.runs
    assert_same(same, packed)

    whole = packed(ids)
    logits, cache = packed.prefill(ids[:, :5], jnp.array([5, 5]), 8)
    for position in (5, 6):
        np.testing.assert_allclose(logits, whole[:, position - 1], rtol=0, atol=2e-2 * np.abs(whole).max())
        logits, cache = packed.decode(ids[:, position], cache)


def test_prepared_models_of_runs_write_the_same_text_and_explain_every_run(packed):
    prepared = bj.models.prepare_for_inference(packed)
    assert prepared.runs == packed.runs
    assert hasattr(prepared.layers["0-1"].attention, "qkv_proj")
    prompts = [[1, 2, 3], [4]]
    assert bj.models.generate(prepared, prompts, 4) == bj.models.generate(packed, prompts, 4)
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
    uniform = bj.compress.calibrate(model, tokens, [("^layers/", "W6A8")], method=method)
    first, other = (each.block(0).ffn.up_proj.kernel.get_value() for each in (packed, uniform))
    assert first.shape == other.shape

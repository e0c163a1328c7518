"""`save_model` and `load_model`: the same model back, at fewer bits if asked, and one clear error for every damage."""

from __future__ import annotations

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax import Precision
from bipolar_jax.checkpoint import read_user
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from tests.support.tiny_checkpoints import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
IDS = np.array([TOKENIZER.encode("the quick brown fox").ids[:6]], np.int32)
MIXED = [
    ("embed", Precision(8, 8)),
    ("attention/[qk]", Precision(3, 8, 16, "mse", scales="float")),
    ("attention/v", Precision(4, 8, 16)),
    ("attention", Precision(5, 6, 24, "minmax", scales="float")),
    ("ffn/down", None),
    ("ffn", Precision(bj.TERNARY, 8)),
]
CASES = {
    "float, tied": (True, []),
    "float, untied": (False, []),
    "W4A8, untied": (False, [(".*", Precision(4, 8))]),
    "mixed, tied": (True, MIXED),
}

forward = jax.jit(lambda model, ids: model(ids))


def config_of(tied: bool) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=TOKENIZER.get_vocab_size(),
        hidden_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        ffn_size=56,
        context_length=64,
        rope_scaling=RopeScaling("llama3", 4.0, 16),
        tie_embeddings=tied,
        qkv_bias=tied,
        bos_id=0,
        eos_ids=(1, 2),
    )


def make_model(tied: bool, rules, dtype=jnp.float32) -> PretrainedModel:
    rng = np.random.default_rng(0)
    config = config_of(tied)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, param_dtype=dtype, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape) + 0.1, leaf.dtype), state)
    return PretrainedModel(bj.quantize_model(nnx.merge(graph, weights), rules), TOKENIZER)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pretrained(request) -> PretrainedModel:
    return make_model(*request.param)


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mixed.bipolar.safetensors"
    save_model(path, make_model(True, MIXED), "random numbers")
    return path


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "float.bipolar.safetensors"
    save_model(path, make_model(False, []))
    return path


def leaves(model: Transformer) -> dict:
    return {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


def in_dtype(leaf, dtype):
    return leaf if isinstance(leaf, bj.BipolarArray) else leaf.astype(dtype)


def precisions(model: Transformer) -> dict:
    return {
        path: layer.precision
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, bj.nn.Linear | bj.nn.Embed)
    }


def assert_identical(found: dict, expected: dict):
    """Same leaves, bit for bit, and the same static fields of packed ones."""
    assert found.keys() == expected.keys()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.mark.sample(2)
def test_a_model_comes_back_bit_for_bit(pretrained, tmp_path):
    save_model(tmp_path / "model", pretrained)
    loaded = load_model(tmp_path / "model")
    assert_identical(leaves(loaded.model), leaves(pretrained.model))
    assert loaded.model.config == pretrained.model.config
    assert precisions(loaded.model) == precisions(pretrained.model)
    np.testing.assert_array_equal(forward(loaded.model, IDS), forward(pretrained.model, IDS))


def test_the_tokenizer_survives(mixed_file):
    assert load_model(mixed_file).tokenizer.to_str() == TOKENIZER.to_str()


@pytest.mark.covered("arrays and logits that survive, by the tests above; texts of equal models, by inference")
def test_greedy_text_survives(mixed_file):
    original, loaded = make_model(True, MIXED), load_model(mixed_file)
    text, again = (
        one.tokenizer.decode(generate(one.model, [one.tokenizer.encode("It's 1984").ids], 8)[0])
        for one in (original, loaded)
    )
    assert text
    assert again == text


@pytest.mark.parametrize("rules", [[], [("ffn", Precision(4, 8))]], ids=["float", "W4A8"])
def test_bfloat16_models_compute_in_bfloat16_after_loading_too(rules, tmp_path):
    original = make_model(True, rules, jnp.bfloat16)
    save_model(tmp_path / "model", original)
    loaded = load_model(tmp_path / "model")
    assert_identical(leaves(loaded.model), leaves(original.model))
    hidden = jax.eval_shape(lambda model: model.hidden_states(IDS), loaded.model)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_array_equal(forward(loaded.model, IDS), forward(original.model, IDS))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_a_file_is_read_in_the_dtype_asked_for(mixed_file, dtype):
    stored, loaded = (load_pretrained(mixed_file, one).model for one in (None, dtype))
    assert_identical(leaves(loaded), {path: in_dtype(leaf, dtype) for path, leaf in leaves(stored).items()})
    hidden = jax.eval_shape(lambda model: model.hidden_states(IDS), loaded)
    assert hidden.dtype == jnp.dtype(dtype)


def test_a_dtype_that_does_not_hold_the_weights_is_refused(tmp_path):
    model = make_model(True, [])
    scale = model.model.final_norm.scale
    scale[...] = scale[...].at[3].set(1e6)
    save_model(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match="model.safetensors: final_norm/scale has 1 values beyond the range"):
        load_model(tmp_path / "model.safetensors", param_dtype=jnp.float16)
    with pytest.raises(ValueError, match="param_dtype is 'int8', expected float32, bfloat16, float16"):
        load_model(tmp_path / "model.safetensors", param_dtype=jnp.int8)


def test_a_reloaded_model_can_be_saved_again(mixed_file, tmp_path):
    save_model(tmp_path / "again", load_model(mixed_file), "random numbers")
    assert read_user(tmp_path / "again") == read_user(mixed_file)
    assert_identical(leaves(load_model(tmp_path / "again").model), leaves(load_model(mixed_file).model))


def truncated(leaf, bits: int):
    """Packed arrays that have more planes keep the top ones; ternary and float ones stay as they are."""
    if not isinstance(leaf, bj.BipolarArray) or leaf.format.ternary or leaf.bits <= bits:
        return leaf
    return leaf.truncate(bits)


@pytest.mark.parametrize("bits", [8, 4, 3, 1])
def test_fewer_bits_are_the_truncated_arrays(mixed_file, bits):
    whole, loaded = load_model(mixed_file).model, load_model(mixed_file, bits).model
    assert_identical(leaves(loaded), {path: truncated(leaf, bits) for path, leaf in leaves(whole).items()})
    for path, precision in precisions(loaded).items():
        expected = precisions(whole)[path]
        if expected.w_bits != bj.TERNARY:
            expected = dataclasses.replace(expected, w_bits=min(bits, expected.w_bits))
        assert precision == expected


def test_logits_at_fewer_bits_are_those_of_the_truncated_arrays(mixed_file):
    cut = load_model(mixed_file).model
    for _, layer in nnx.iter_modules(cut):
        for name in ("kernel", "embedding"):
            if isinstance(weights := getattr(layer, name, None), bj.nn.Packed):
                weights.set_value(truncated(weights.get_value(), 2))
    np.testing.assert_array_equal(forward(load_model(mixed_file, 2).model, IDS), forward(cut, IDS))


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_bits_are_refused(mixed_file, bits):
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        load_model(mixed_file, bits)


def test_what_the_file_says_of_itself(mixed_file):
    user = read_user(mixed_file)
    assert user["source"] == "random numbers"
    assert user["precisions"]["layers/ffn/up_proj"] == {
        "bits": 2,
        "ternary": True,
        "a_bits": 8,
        "group_size": None,
        "calibration": "mse",
        "scales": "float",
    }
    assert "layers/ffn/down_proj" not in user["precisions"]


def damaged(source, path, change_user=None, change_tree=None):
    """A whole file with sound checksums, its content changed."""
    tree, user = bj.load(source), copy.deepcopy(read_user(source))
    if change_tree is not None:
        change_tree(tree)
    if change_user is not None:
        change_user(user)
    bj.save(path, tree, user)
    return path


@pytest.mark.parametrize("field", ["config", "precisions", "tokenizer"])
def test_packed_arrays_without_a_model_are_refused(mixed_file, tmp_path, field):
    path = damaged(mixed_file, tmp_path / "arrays", change_user=lambda user: user.pop(field))
    with pytest.raises(ValueError, match="arrays holds packed arrays but no model: read it with"):
        load_model(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_size": 57}, r"layers/ffn/down_proj/kernel float32\[2, 56, 40\].* asks for float32\[2, 57, 40\]"),
        ({"num_layers": 3}, r"float32\[2, .* asks for float32\[3, "),
        ({"vocab_size": 100}, "embed/embedding .* asks for"),
        ({"tie_embeddings": True}, "lm_head/kernel"),
        ({"qkv_bias": True}, r"lacks \[.*layers/attention/k_proj/bias.*\] and has in excess nothing"),
        ({"num_heads": 3}, "num_heads=3 must be a multiple of num_kv_heads=2"),
        ({"wings": 4}, r"unknown fields \['wings'\]"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_refused(float_file, tmp_path, fields, message):
    path = damaged(float_file, tmp_path / "other", change_user=lambda user: user["config"].update(fields))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda user: user.update(config=[]), "model config is a list"),
        (lambda user: user["config"].update(num_layers="2"), "num_layers must be an integer, got '2'"),
        (lambda user: user["config"].update(hidden_size=10**30), "hidden_size must be at most 2147483647"),
        (lambda user: user["config"].update(ffn_size=2**31 - 1, hidden_size=2**31 - 1), ""),
        (lambda user: user["config"].update(eos_ids=[True]), "BOS and EOS ids must be integers, got True"),
        (lambda user: user["config"].update(eos_ids=5), ""),
        (lambda user: user["config"].update(norm_eps="1e-5"), ""),
        (lambda user: user["config"].update(rope_scaling={"kind": "yarn", "factor": 10**400}), ""),
        (lambda user: user["config"].update(rope_scaling=5), ""),
        (lambda user: user["config"].update(tie_embeddings="no"), "tie_embeddings must be True or False, got 'no'"),
        (lambda user: user.update(param_dtype="float8"), "param_dtype is 'float8', expected float32, bfloat16"),
        (lambda user: user.update(param_dtype={}), "param_dtype is a dict, expected a text"),
        (lambda user: user.update(precisions=[]), ""),
        (lambda user: next(iter(user["precisions"].values())).pop("a_bits"), "KeyError 'a_bits'"),
        (lambda user: next(iter(user["precisions"].values())).update(calibration="newest"), "newest"),
        (lambda user: next(iter(user["precisions"].values())).update(group_size=0), "group_size"),
        (lambda user: next(iter(user["precisions"].values())).update(trained=5), ""),
        (lambda user: user.update(tokenizer={}), "tokenizer is a dict, expected a text"),
        (lambda user: user.update(tokenizer='{"version": "2.0"}'), "is damaged"),
        (lambda user: user.update(chat_template=7), ""),
    ],
    ids=range(20),
)
def test_files_of_another_version_are_named(mixed_file, tmp_path, change, message):
    path = damaged(mixed_file, tmp_path / "other", change_user=change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        load_model(path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(float_file, tmp_path, value):
    def spoil(tree):
        tree["final_norm"]["scale"] = tree["final_norm"]["scale"].at[3].set(value)

    path = damaged(float_file, tmp_path / "nan", change_tree=spoil)
    with pytest.raises(ValueError, match="nan: final_norm/scale has 1 values that are not finite"):
        load_model(path)


@pytest.mark.sample(2)
def test_the_tokenizer_encodes_whole_texts(pretrained, tmp_path):
    copy = type(pretrained.tokenizer).from_str(pretrained.tokenizer.to_str())
    copy.enable_truncation(2)
    copy.enable_padding(length=4)
    save_model(tmp_path / "x", dataclasses.replace(pretrained, tokenizer=copy))
    text = "the quick brown fox"
    assert load_model(tmp_path / "x").tokenizer.encode(text).ids == pretrained.tokenizer.encode(text).ids


def test_missing_tensors_are_named(mixed_file, tmp_path):
    def drop(tree):
        del tree["layers"]["attention"]["k_proj"]["kernel"]

    path = damaged(mixed_file, tmp_path / "x", change_tree=drop)
    with pytest.raises(ValueError, match=r"lacks \['layers/attention/k_proj/kernel'\] and has in excess nothing"):
        load_model(path)


def test_float_weights_where_packed_ones_belong_are_refused(mixed_file, tmp_path):
    def unpack(tree):
        tree["embed"]["embedding"] = tree["embed"]["embedding"].dequantize()

    with pytest.raises(ValueError, match="embed/embedding"):
        load_model(damaged(mixed_file, tmp_path / "x", change_tree=unpack))


@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
def test_a_flipped_byte_is_found(mixed_file, tmp_path, where):
    content = bytearray(mixed_file.read_bytes())
    content[int(where * len(content))] ^= 0x10
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped is (truncated or )?corrupted"):
        load_model(tmp_path / "flipped")


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.99])
def test_a_truncated_file_is_refused(mixed_file, tmp_path, kept):
    content = mixed_file.read_bytes()
    (tmp_path / "short").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="short is truncated or corrupted"):
        load_model(tmp_path / "short")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        load_model(tmp_path / "nothing-here")

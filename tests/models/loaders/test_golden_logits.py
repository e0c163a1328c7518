"""Logits of tiny checkpoints of every supported architecture and config layout equal those of transformers.

`golden/make.py` made them once; see there for the command and the versions.
"""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.models.loaders import load_gguf, load_huggingface
from bipolar_jax.models.transformer import Transformer
from tests.models.loaders.golden import checkpoints
from tests.support import tiny_checkpoints as tiny

GOLDEN = checkpoints.read()
# The storage of each layout's checkpoint: dtype and number of files.
STORAGE = {"4": (ml_dtypes.bfloat16, 2), "5": (np.float32, 1)}
# One of each kind of positions, norms, biases, windows, caps and scalings, and of experts; heads that are shared, and
# numbers of heads that are odd or even.
KINDS = (
    "llama 3.1",
    "qwen2 0.5b",
    "opt, untied",
    "bloom, 6 heads",
    "gemma 2",
    "gemma 3 1b",
    "phi 4 mini",
    "qwen3 moe, dense layers",
)
# Models with experts, whose weights have two layouts.
WITH_EXPERTS = ("mixtral, a window", "qwen3 moe, dense layers")
# float32 against float32, summed in another order: measured at most 7e-7 of the largest logit.
ROUNDING = 5e-6

forward = jax.jit(lambda model, ids: model(ids))
prefill = jax.jit(lambda model, ids, lengths, capacity: model.prefill(ids, lengths, capacity), static_argnums=3)
decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache))


def load(name: str, directory, layout: str = "5") -> Transformer:
    golden = GOLDEN[name]
    weights = checkpoints.make_weights(golden.configs["4"], golden.own_head)
    return load_huggingface(checkpoints.write(directory, golden.configs[layout], weights, *STORAGE[layout])).model


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[checkpoints.Golden, Transformer]:
    return GOLDEN[request.param], load(request.param, tmp_path_factory.mktemp("golden"))


def assert_same_logits(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("layout", STORAGE)
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.sample(2)
def test_logits_are_those_of_transformers(tmp_path, name, layout):
    golden = GOLDEN[name]
    assert_same_logits(forward(load(name, tmp_path, layout), golden.ids), golden.logits)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_in_one_tensor_are_those_of_single_tensors(tmp_path, name):
    golden = GOLDEN[name]
    weights = checkpoints.make_weights(golden.configs["4"], golden.own_head)
    folders = [
        checkpoints.write(tmp_path / layout, golden.configs["5"], tensors, np.float32, 1)
        for layout, tensors in (("single", weights), ("together", checkpoints.with_experts_together(weights)))
    ]
    single, together = (jax.tree.leaves(load_huggingface(folder).model) for folder in folders)
    assert all(np.array_equal(one, other) for one, other in zip(single, together, strict=True))
    # Numbers of experts that the tensors do not have; a list of the last would not fit in memory.
    wrong = {7: "not those of 7 experts", 2**31 - 1: "not those of 2147483647 experts"}
    wrong |= {0: "unexpected tensor .*mlp.experts"} if "qwen3" in name else {}
    for count, message in wrong.items():
        (folders[1] / "config.json").write_text(json.dumps(golden.configs["5"] | {"num_local_experts": count}))
        with pytest.raises(ValueError, match=message):
            load_huggingface(folders[1])


@pytest.mark.parametrize("name", ["llama 3", "qwen2 7b"])
def test_gguf_files_of_the_same_weights(tmp_path, name):
    golden = GOLDEN[name]
    config = golden.configs["4"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    tokens = ["a", "b", "ab", *(f"token{token}" for token in range(3, config["vocab_size"]))]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["a b"],
    }
    checkpoint = tiny.Tiny(
        config["model_type"],
        checkpoints.make_weights(config),
        config=config | {"head_dim": head_dim},
        metadata=metadata,
    )
    loaded = load_gguf(tiny.write_gguf(checkpoint, tmp_path / "model.gguf"))
    assert_same_logits(forward(loaded.model, golden.ids), golden.logits)


@pytest.mark.sample(4)
def test_prefill_and_decoding_give_the_full_forward_pass(kind):
    """Two texts of different lengths; of float models, so equal but for the order of float32 sums."""
    golden, model = kind
    rows, lengths = np.arange(checkpoints.BATCH), np.array([3, 5], np.int32)
    logits, cache = prefill(model, golden.ids[:, :5], lengths, checkpoints.LENGTH)
    for step in range(checkpoints.LENGTH - 5 + 1):
        at = lengths + step
        np.testing.assert_allclose(
            logits, golden.logits[rows, at - 1], rtol=0, atol=ROUNDING * np.abs(golden.logits).max()
        )
        if step < checkpoints.LENGTH - 5:
            logits, cache = decode(model, golden.ids[rows, at], cache)


@pytest.mark.sample(2)
def test_a_text_alone_scores_as_in_a_batch(kind):
    golden, model = kind
    for row in range(checkpoints.BATCH):
        assert_same_logits(forward(model, golden.ids[row : row + 1])[0], golden.logits[row])


def test_quantized_activations_make_a_text_alone_differ_by_roundings_only(tmp_path):
    """A number near the middle of two steps may round to either: each flip is a small part of what W8A8 loses."""
    golden = GOLDEN["llama 3.1"]
    model = bj.quantize_model(load("llama 3.1", tmp_path), [("down_proj", "W8A8")])
    together, alone = forward(model, golden.ids), forward(model, golden.ids[:1])
    loss = np.linalg.norm(together - golden.logits)
    assert 0 < loss < 0.02 * np.linalg.norm(golden.logits)
    assert np.linalg.norm(alone[0] - together[0]) < loss / 4

"""OPT and BLOOM, read from their Hugging Face form, against numpy float64 forward passes written from the papers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.models.blocks.alibi import alibi_slopes
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.models.pretrained import PretrainedModel
from tests.models.loaders import tiny_opt_bloom as tiny

CASES = {
    "opt": tiny.make_opt(),
    "opt, written without its head": tiny.make_opt(heads=3, prefix=""),
    "bloom": tiny.make_bloom(),
    "bloom, 6 heads, written with its head": tiny.make_bloom(heads=6, prefix="transformer."),
}
# float32 against float64: measured at most 4e-7 of the largest logit.
ROUNDING = 4e-6

forward = jax.jit(lambda model, ids: model(ids))
prefill = jax.jit(lambda model, ids, lengths, capacity: model.prefill(ids, lengths, capacity), static_argnums=3)
decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache))


def load(checkpoint: tiny.Checkpoint, directory) -> PretrainedModel:
    return load_huggingface(checkpoint.write(directory))


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def case(request, tmp_path_factory) -> tuple[tiny.Checkpoint, PretrainedModel]:
    return CASES[request.param], load(CASES[request.param], tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["opt", "bloom"])
def pretrained(request, tmp_path_factory) -> PretrainedModel:
    return load(CASES[request.param], tmp_path_factory.mktemp("tiny"))


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, shape).astype(np.int32)


def assert_same_logits(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


# The models of the papers: one text, float64, no batch, weights by the names of the file.

# Press et al. 2021, arXiv 2108.12409: 4 heads have 2^-2 ... 2^-8; 6 heads have these, then 2^-1 and 2^-3 of 8 heads.
SLOPES = {4: [2**-2, 2**-4, 2**-6, 2**-8], 6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}


class Weights:
    def __init__(self, weights: dict, prefix: str):
        self._weights = {name.removeprefix(prefix): array.astype(np.float64) for name, array in weights.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[name]

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def layer_norm(self, x, name, eps):
        """Ba et al. 2016, arXiv 1607.06450."""
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
        return centred / deviation * self[f"{name}.weight"] + self[f"{name}.bias"]


def attend(q, k, v, slope: float):
    """Causal softmax attention of one head, query by query, less slope times distance."""
    rows = []
    for i, query in enumerate(q):
        scores = np.array([k[j] @ query / np.sqrt(len(query)) - slope * (i - j) for j in range(i + 1)])
        weights = np.exp(scores - scores.max())
        rows.append(weights / weights.sum() @ v[: i + 1])
    return np.stack(rows)


def opt_logits(config: dict, weights: dict, ids: np.ndarray) -> np.ndarray:
    """Zhang et al. 2022, arXiv 2205.01068; positions start at row 2 of their table."""
    w, heads = Weights(weights, "model."), config["num_attention_heads"]
    x = np.stack(
        [w["decoder.embed_tokens.weight"][t] + w["decoder.embed_positions.weight"][p + 2] for p, t in enumerate(ids)]
    )
    for layer in range(config["num_hidden_layers"]):
        name = f"decoder.layers.{layer}."
        y = w.layer_norm(x, f"{name}self_attn_layer_norm", 1e-5)
        q, k, v = (np.split(w.linear(y, f"{name}self_attn.{p}_proj"), heads, axis=-1) for p in "qkv")
        context = np.concatenate([attend(q[h], k[h], v[h], 0.0) for h in range(heads)], axis=-1)
        x = x + w.linear(context, f"{name}self_attn.out_proj")
        y = w.linear(w.layer_norm(x, f"{name}final_layer_norm", 1e-5), f"{name}fc1")
        x = x + w.linear(np.maximum(y, 0), f"{name}fc2")
    return w.layer_norm(x, "decoder.final_layer_norm", 1e-5) @ w["decoder.embed_tokens.weight"].T


def bloom_logits(config: dict, weights: dict, ids: np.ndarray) -> np.ndarray:
    """Le Scao et al. 2022, arXiv 2211.05100."""
    w, heads, eps = Weights(weights, "transformer."), config["num_attention_heads"], config["layer_norm_epsilon"]
    x = w.layer_norm(w["word_embeddings.weight"][ids], "word_embeddings_layernorm", eps)
    for layer in range(config["n_layer"]):
        name = f"h.{layer}."
        fused = w.linear(w.layer_norm(x, f"{name}input_layernorm", eps), f"{name}self_attention.query_key_value")
        contexts = []
        for head, slope in zip(np.split(fused, heads, axis=-1), SLOPES[heads], strict=True):
            q, k, v = np.split(head, 3, axis=-1)
            contexts.append(attend(q, k, v, slope))
        x = x + w.linear(np.concatenate(contexts, axis=-1), f"{name}self_attention.dense")
        y = w.linear(w.layer_norm(x, f"{name}post_attention_layernorm", eps), f"{name}mlp.dense_h_to_4h")
        gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + w.linear(gelu, f"{name}mlp.dense_4h_to_h")
    return w.layer_norm(x, "ln_f", eps) @ w["word_embeddings.weight"].T


def test_forward_is_that_of_the_papers(case):
    checkpoint, pretrained = case
    numpy_logits = {"opt": opt_logits, "bloom": bloom_logits}[checkpoint.config["model_type"]]
    ids = random_ids(2, 13)
    for row, row_ids in zip(forward(pretrained.model, ids), ids, strict=True):
        assert_same_logits(row, numpy_logits(checkpoint.config, checkpoint.weights, row_ids))


@pytest.mark.sample(2)
def test_cached_decoding_gives_the_full_forward_pass_at_every_step(case):
    """Two texts of different lengths up to the whole context, each against its own full forward pass."""
    model = case[1].model
    ids, lengths = random_ids(2, tiny.CONTEXT), np.array([4, 9], np.int32)
    full = np.asarray(forward(model, ids))
    logits, cache = prefill(model, ids[:, :9], lengths, tiny.CONTEXT)
    for step in range(tiny.CONTEXT - 9 + 1):
        at = lengths + step
        for row in range(2):
            assert_same_logits(logits[row], full[row, at[row] - 1])
        if step < tiny.CONTEXT - 9:
            logits, cache = decode(model, ids[np.arange(2), at], cache)


def test_a_ragged_batch_equals_its_prompts_alone(pretrained):
    ids, lengths = random_ids(3, 9), np.array([1, 5, 9], np.int32)
    together, _ = prefill(pretrained.model, ids, lengths, 9)
    for row, length in enumerate(lengths):
        assert_same_logits(together[row], forward(pretrained.model, ids[row : row + 1, :length])[0, -1])


def test_padding_has_no_influence(pretrained):
    ids, lengths = random_ids(2, 8), np.array([2, 5], np.int32)
    other = np.where(np.arange(8) < lengths[:, None], ids, random_ids(2, 8, seed=1))
    (first, cache), (second, other_cache) = (prefill(pretrained.model, x, lengths, 10) for x in (ids, other))
    for _ in range(5):  # up to the capacity, over all the padding
        np.testing.assert_array_equal(first, second)
        tokens = np.argmax(first, axis=-1).astype(np.int32)
        first, cache = decode(pretrained.model, tokens, cache)
        second, other_cache = decode(pretrained.model, tokens, other_cache)


@pytest.mark.sample(1)
def test_generation_continues_each_prompt_as_full_forward_passes_do(pretrained):
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 11)]
    for prompt, tokens in zip(prompts, generate(pretrained.model, prompts, 8), strict=True):
        choices = np.argmax(forward(pretrained.model, np.array([prompt + tokens], np.int32))[0], axis=-1)
        assert tokens == choices[len(prompt) - 1 : -1].tolist()


def test_learned_positions_end_with_the_context(tmp_path):
    model = load(CASES["opt"], tmp_path).model
    with pytest.raises(ValueError, match=f"{tiny.CONTEXT + 1} tokens exceed the model's context of {tiny.CONTEXT}"):
        model(random_ids(1, tiny.CONTEXT + 1))


def test_alibi_goes_beyond_the_context(tmp_path):
    checkpoint = CASES["bloom"]
    ids = random_ids(1, tiny.CONTEXT + 9)
    logits = forward(load(checkpoint, tmp_path).model, ids)
    assert_same_logits(logits[0], bloom_logits(checkpoint.config, checkpoint.weights, ids[0]))


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [0.5 * i for i in range(1, 17)]),
    ],
)
def test_slopes_of_alibi(heads, exponents):
    np.testing.assert_allclose(alibi_slopes(heads), 2.0 ** -np.array(exponents), rtol=1e-15)


def test_every_head_has_a_slope_of_its_own():
    for heads in range(1, 130):
        slopes = alibi_slopes(heads)
        assert len(set(slopes)) == heads
        assert slopes.min() >= 2**-8
        assert slopes.max() < 1


@pytest.mark.sample(1)
def test_every_linear_layer_is_quantized_and_little_is_lost(pretrained):
    quantized = bj.quantize_model(pretrained.model, [("^(layers/|embed$)", bj.Precision(8, 8, calibration="minmax"))])
    assert not [path for path, layer in nnx.iter_modules(quantized) if isinstance(layer, nnx.Linear)]
    layers = {"/".join(path) for path, layer in nnx.iter_modules(quantized) if isinstance(layer, bj.nn.Linear)}
    names = ("attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj")
    assert layers == {f"layers/{name}" for name in (*names, "ffn/up_proj", "ffn/down_proj")}
    ids = random_ids(2, 9)
    expected = np.asarray(forward(pretrained.model, ids))
    error = np.linalg.norm(forward(quantized, ids) - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.03  # measured 1.2% and 1.1%


@pytest.mark.sample(1)
def test_a_packed_checkpoint_comes_back_bit_for_bit(pretrained, tmp_path):
    quantized = bj.quantize_model(pretrained.model, [("^layers/", bj.Precision(4, 8, 16))])
    save_model(tmp_path / "model", PretrainedModel(quantized, pretrained.tokenizer))
    loaded = load_model(tmp_path / "model").model
    assert loaded.config == pretrained.model.config
    np.testing.assert_array_equal(forward(loaded, random_ids(1, 6)), forward(quantized, random_ids(1, 6)))


def test_bfloat16_stays_bfloat16(pretrained):
    graph, state = nnx.split(
        nnx.eval_shape(
            lambda: type(pretrained.model)(pretrained.model.config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    model = nnx.merge(graph, state)
    ids = random_ids(1, 6)
    assert jax.eval_shape(lambda model: model.hidden_states(ids), model).dtype == jnp.bfloat16
    logits, cache = jax.eval_shape(lambda model: model.prefill(ids, jnp.array([6]), 8), model)
    logits, cache = jax.eval_shape(lambda model, cache: model.decode(ids[:, 0], cache), model, cache)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)

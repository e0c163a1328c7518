"""Random models: built like real ones, consistent inside, of order one at every depth, and made in little memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax import Precision
from bipolar_jax.models import random_weights
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_float, random_packed
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.packing.bipolar_array import code_sums
from bipolar_jax.packing.words import pack_codes
from tests.support.optimizations import optimizations

# No contracted size is a multiple of 32, so that last words and last groups are short.
LLAMA = TransformerConfig(
    vocab_size=41,
    hidden_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_size=56,
    context_length=32,
)
BIASED = dict(norm="layer", qkv_bias=True, linear_bias=True, tie_embeddings=True)
CONFIGS = {
    "llama": LLAMA,
    "opt": dataclasses.replace(LLAMA, positions="learned", ffn="relu", **BIASED),
    "bloom": dataclasses.replace(LLAMA, positions="alibi", ffn="gelu", embed_norm=True, **BIASED),
}
PRECISIONS = {
    "W1A8": Precision(1, 8),
    "W1A8g16f-minmax": Precision(1, 8, 16, "minmax", scales="float"),
    "W3A4g20f-minmax": Precision(3, 4, 20, "minmax", scales="float"),
    "W1.58A8g33f": Precision(bj.TERNARY, 8, 33, scales="float"),
    "W4A16g32": Precision(4, None, 32),
    "W8A8": Precision(8, 8),
    "W1A8g16": Precision(1, 8, 16),
    "W4A8g32": Precision(4, 8, 32),
}
KEY = jax.random.key(0)

forward = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module", params=CONFIGS)
def config(request) -> TransformerConfig:
    return CONFIGS[request.param]


def packed_arrays(model: Transformer) -> dict[str, bj.BipolarArray]:
    state = nnx.to_flat_state(nnx.state(model, bj.nn.Packed))
    return {"/".join(path): variable.get_value() for path, variable in state}


def layouts(model: Transformer):
    """Everything about a model but its numbers."""
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    return graph, structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("precision", ["W3A4g20f-minmax", "W1.58A8g33f", "W8A8", "W4A8g32"])
@pytest.mark.sample(2)
def test_built_as_quantize_model_builds(config, precision):
    rules = [("^layers/", PRECISIONS[precision]), ("^(embed|lm_head)$", Precision(8))]
    expected = nnx.eval_shape(
        lambda: bj.quantize_model(Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rules)
    )
    found = nnx.eval_shape(lambda: random_packed(config, PRECISIONS[precision], key=KEY))
    assert layouts(found) == layouts(expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_float_models_are_built_as_any_other(config, dtype):
    expected = nnx.eval_shape(lambda: Transformer(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    assert layouts(nnx.eval_shape(lambda: random_float(config, dtype, KEY))) == layouts(expected)


def test_float_ends_stay_float():
    model = nnx.eval_shape(lambda: random_packed(LLAMA, PRECISIONS["W8A8"], key=KEY, embed_bits=None))
    assert (type(model.embed), type(model.lm_head)) == (nnx.Embed, nnx.Linear)
    assert model.embed.embedding.get_value().dtype == jnp.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.sample(2)
def test_packed_arrays_keep_their_laws(precision):
    model = random_packed(LLAMA, PRECISIONS[precision], key=KEY, embed_bits=5)
    arrays = packed_arrays(model)
    assert len(arrays) == 9
    for path, array in arrays.items():
        array.check()
        codes = array.codes()
        sums = code_sums(codes, array.group_size)
        if array.groups is not None:
            array.groups.check(array.format, sums.shape)
            sums = jnp.sum(array.signed_rows(), axis=-1, keepdims=True, dtype=jnp.int32)
        np.testing.assert_array_equal(array.row_sums, sums, err_msg=path)
        # The same planes again, so that bits past the end are 0 and ternary codes have their only form.
        np.testing.assert_array_equal(pack_codes(codes, array.format), array.planes, err_msg=path)


@pytest.mark.parametrize("precision", ["W1A8", "W3A4g20f-minmax", "W1.58A8g33f", "W4A16g32", "W4A8g32"])
@pytest.mark.sample(1)
def test_bits_are_fair_and_numbers_of_the_scale_of_trained_ones(precision):
    config = dataclasses.replace(LLAMA, hidden_size=200, ffn_size=210, num_layers=4)
    model = random_packed(config, PRECISIONS[precision], key=KEY)
    for name, k, sums in (("gate_proj", 200, 1), ("up_proj", 200, 1), ("down_proj", 210, 8)):
        kernel = getattr(model.layers.ffn, name).kernel.get_value()
        numbers = np.asarray(kernel.dequantize())
        # Half a million independent numbers: the mean within 5 of its standard deviations, the spread within 2%, plus
        # what the offsets of "minmax" add to a coarse grid.
        has_offsets = kernel.offset is not None or kernel.groups is not None
        assert abs(numbers.mean()) < 5 * numbers.std() / numbers.size**0.5 + 0.1 * has_offsets
        assert numbers.std() == pytest.approx((k * sums) ** -0.5, rel=0.2 if has_offsets else 0.02)
        codes = np.asarray(kernel.codes())
        assert set(np.unique(codes)) == set(range(kernel.format.max_value + 1))
        for one in range(4):  # no layer is another's
            assert all((codes[one] != codes[other]).mean() > 0.4 for other in range(one))


def test_the_key_decides_the_bits():
    models = [random_packed(LLAMA, PRECISIONS["W8A8"], key=jax.random.key(seed)) for seed in (1, 1, 2)]
    first, again, other = ([array.planes for array in packed_arrays(model).values()] for model in models)
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != different).any()


@pytest.mark.covered("inference/test_generation.py; their shapes, by the tests beside")
def test_they_prefill_decode_and_generate(config):
    model = random_packed(config, PRECISIONS["W8A8"], key=KEY, dtype=jnp.float32)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    generated = generate(model, prompts, 5)
    texts = [prompt + tokens for prompt, tokens in zip(prompts, generated, strict=True)]
    longest = max(map(len, texts))
    logits = forward(model, np.array([text + [0] * (longest - len(text)) for text in texts], np.int32))
    assert np.isfinite(logits).all()
    for prompt, tokens, text, row in zip(prompts, generated, texts, np.argmax(logits, axis=-1), strict=True):
        assert tokens == row[len(prompt) - 1 : len(text) - 1].tolist()


@pytest.mark.parametrize(
    ("kind", "make", "num_layers"),
    [
        ("llama", "W8A8", 1),
        ("llama", "W8A8", 24),
        ("llama", "W1A8", 24),
        ("llama", "W3A4g20f-minmax", 24),
        ("llama", "float", 24),
        ("opt", "W1.58A8g33f", 24),
        ("opt", "float", 24),
        ("bloom", "W8A8", 24),
    ],
)
@pytest.mark.sample(1)
def test_activations_are_of_order_one_at_every_depth(kind, make, num_layers):
    deep = dataclasses.replace(CONFIGS[kind], num_layers=num_layers, hidden_size=128, ffn_size=256)
    precision = PRECISIONS.get(make)
    model = random_packed(deep, precision, key=KEY) if precision else random_float(deep, jnp.bfloat16, KEY)

    # A final norm that divides by the root of its epsilon alone, so that logits are as large as the residual stream.
    model.final_norm.epsilon = 1e30
    model.final_norm.scale[...] = jnp.full_like(model.final_norm.scale[...], 1e15)

    @jax.jit
    def prefill(model):
        return model.prefill(np.arange(20, dtype=np.int32)[None], jnp.array([20]), 20)

    logits, cache = prefill(model)
    for found, axes in ((logits, None), (cache.keys, (1, 2, 3, 4)), (cache.values, (1, 2, 3, 4))):
        size = np.sqrt(np.mean(np.asarray(found, np.float32) ** 2, axis=axes))
        assert np.all((size > 0.1) & (size < 4)), size


def test_one_bit_activations_stay_finite():
    deep = dataclasses.replace(LLAMA, num_layers=24)
    assert np.isfinite(forward(random_packed(deep, Precision(1, 1), key=KEY), np.arange(20)[None])).all()


@pytest.mark.parametrize(
    ("make", "tied"),
    [("W1A8", True), ("W2A8", False), ("W4A8g64", False), ("W8A8g40", True), ("bfloat16", False), ("float32", True)],
)
@pytest.mark.sample(2)
def test_less_than_a_layer_is_held_beside_the_result(make, tied, monkeypatch):
    """What XLA says it allocates in every step; the embedding is as large as several layers."""
    config = TransformerConfig(
        vocab_size=2048,
        hidden_size=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        ffn_size=512,
        context_length=32,
        tie_embeddings=tied,
    )
    outputs, temporaries, draw = [], [], random_weights._draw

    def measured_draw(*args):
        memory = draw.lower(*args).compile().memory_analysis()
        outputs.append(memory.output_size_in_bytes)
        temporaries.append(memory.temp_size_in_bytes)
        return draw(*args)

    monkeypatch.setattr(random_weights, "_draw", measured_draw)
    with optimizations(True):
        if make in ("bfloat16", "float32"):
            model = random_float(config, jnp.dtype(make), KEY)
        else:
            model = random_packed(config, Precision.parse(make), key=KEY)
    state = nnx.state(model)
    drawn = {path: leaf for path, leaf in nnx.to_flat_state(state) if path[-1] in ("kernel", "embedding")}
    # XLA counts the pointers of tuples, 8 bytes an array.
    assert sum(outputs) == pytest.approx(sum(leaf.nbytes for leaf in jax.tree.leaves(drawn)), abs=40 * len(drawn))
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(state["layers"])) / config.num_layers
    assert 0 < max(temporaries) < layer


@pytest.mark.parametrize(("name", "w_bits"), [("llama-2-70b", 2), ("opt-6.7b", 4), ("bloom-7b1", 1)])
def test_large_models_take_the_bytes_of_their_bits(name, w_bits):
    config = preset(name)
    state = jax.eval_shape(lambda key: nnx.state(random_packed(config, Precision(w_bits, 8), key=key)), KEY)
    floats = jax.eval_shape(lambda key: nnx.state(random_float(config, jnp.bfloat16, key)), KEY)

    def num_bytes(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # Scales and row sums are 8 bytes a column; norms, biases and positions stay bfloat16.
    assert num_bytes(state["layers"]) == pytest.approx(num_bytes(floats["layers"]) * w_bits / 16, rel=0.02)
    assert num_bytes(state["embed"]) == pytest.approx(num_bytes(floats["embed"]) / 2, rel=0.01)


def test_groups_larger_than_a_layer_are_refused():
    with pytest.raises(ValueError, match=r"cannot quantize layer layers/.*group_size must be an integer from 1 to the"):
        random_packed(LLAMA, Precision(4, 8, 128), key=KEY)

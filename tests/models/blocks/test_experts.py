"""Layers with experts: only the chosen experts' weights are read; results, gradients, files and calibration."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.compress import Rounding, calibrate, rotate
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.expert_config import Experts
from bipolar_jax.models.inference.explain import explain_model
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.models.sharding.plan import plan_shards
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import run_name
from bipolar_jax.nn.layers.experts import ExpertBlocks, block_shape, merges_columns, run_experts
from bipolar_jax.quantize import Precision

EXPERTS = Experts(count=5, per_token=2, ffn_size=24)
CONFIG = TransformerConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    ffn_size=48,
    context_length=32,
    experts=EXPERTS,
)
IDS = np.arange(24).reshape(2, 12) % 40
RULES = [("^layers/", "W4A8")]
forward = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def packed(model) -> Transformer:
    return bj.quantize_model(model, RULES)


@pytest.fixture(scope="module")
def prepared(packed) -> Transformer:
    return prepare_for_inference(packed)


@functools.cache
def stack_of_layers() -> nnx.Module:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(32, 24, use_bias=False, rngs=rngs)

    return make(nnx.Rngs(1).split(EXPERTS.count))


def chosen(tokens: int) -> np.ndarray:
    """Experts of each token; the first ones more often, and the last one never."""
    draw = np.random.default_rng(tokens)
    return np.stack([draw.choice(4, 2, replace=False, p=[0.6, 0.2, 0.1, 0.1]) for _ in range(tokens)])


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_token_is_in_a_row_of_each_of_its_experts(tokens):
    experts = chosen(tokens)
    weights = np.arange(1, 2 * tokens + 1, dtype=np.float32).reshape(tokens, 2)
    blocks = ExpertBlocks.of(jnp.asarray(experts), jnp.asarray(weights), EXPERTS.count)
    num_blocks, size = block_shape(tokens, 2, EXPERTS.count)
    assert blocks.sources.shape == blocks.weights.shape == (num_blocks, size)
    rows = {
        (int(token), int(expert)): float(weight)
        for expert, sources, of_rows in zip(blocks.experts, blocks.sources, blocks.weights, strict=True)
        for token, weight in zip(sources, of_rows, strict=True)
        if token < tokens
    }
    assert rows == {(t, int(experts[t, i])): float(weights[t, i]) for t in range(tokens) for i in range(2)}
    assert np.sum(np.asarray(blocks.sources) < tokens) == 2 * tokens
    x = jnp.asarray(np.random.default_rng(0).normal(size=(tokens, 3)), jnp.float32)
    np.testing.assert_allclose(blocks.scatter(blocks.gather(x)), x * weights.sum(1, keepdims=True), rtol=1e-5)
    if blocks.is_used is not None:
        has_tokens = np.any(np.asarray(blocks.sources) < tokens, axis=1)
        np.testing.assert_array_equal(blocks.is_used, has_tokens)
        assert list(has_tokens) == sorted(has_tokens, reverse=True)


def test_no_choice_of_experts_needs_more_blocks():
    """Of all numbers of tokens that experts can have, one token more than fills blocks needs the most."""
    for tokens, per_token, count in ((1, 2, 5), (9, 2, 5), (40, 3, 4), (700, 2, 3)):
        num_blocks, size = block_shape(tokens, per_token, count)
        draw = np.random.default_rng(0)
        for _ in range(50):
            share = draw.dirichlet(np.full(count, 0.3))
            ranked = np.argsort(-(np.log(share + 1e-30) + draw.gumbel(size=(tokens, count))), axis=1)[:, :per_token]
            assert np.sum(-(-np.bincount(ranked.ravel(), minlength=count) // size)) <= num_blocks


@pytest.mark.parametrize("tokens", [3, 40])
def test_products_and_gradients_are_those_of_each_expert(tokens):
    layers, experts = stack_of_layers(), jnp.asarray(chosen(tokens))
    x, ones = jnp.sin(jnp.arange(tokens * 32.0)).reshape(tokens, 32), jnp.ones((tokens, 2))

    def by_blocks(layers, x):
        blocks = ExpertBlocks.of(experts, ones, EXPERTS.count)
        return blocks.scatter(run_experts(layers, blocks.gather(x), blocks))

    def literally(layers, x):
        return jnp.einsum("tk,tckn->tn", x, layers.kernel[...][experts], precision="highest")

    def with_gradients(function):
        return jax.jit(jax.value_and_grad(lambda *operands: jnp.sum(function(*operands) ** 2), argnums=(0, 1)))

    found, expected = (with_gradients(function)(layers, x) for function in (by_blocks, literally))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())
    assert not np.any(found[1][0].kernel[...][4])


def test_stacks_of_experts_are_rounded_as_each_expert_alone(model, packed):
    float_kernel, kernel = (each.layers.ffn.experts.down_proj.kernel.get_value() for each in (model, packed))
    alone, of_stack = bj.quantize(float_kernel[1, 3], 4, -2), jax.tree.map(lambda leaf: leaf[1, 3], kernel)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(of_stack), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.covered("stacks, by the test above; products, by the test of each expert")
def test_packed_experts_round_as_each_would_alone(packed):
    """A block against experts that are computed for all tokens, one after the other."""
    x = np.sin(np.arange(12 * 32, dtype=np.float32)).reshape(1, 12, 32)

    @jax.jit
    def both(layer, x):
        ffn, norm = layer.ffn, layer.ffn_norm
        tokens = norm(x)[0]
        weights = jax.nn.softmax(tokens @ ffn.router.kernel[...], axis=-1)
        kept = jnp.where(weights >= jnp.sort(weights, axis=-1)[:, -2:-1], weights, 0)

        def add(total, expert):
            one, weight = expert
            out = one.down_proj(jax.nn.silu(one.gate_proj(tokens)) * one.up_proj(tokens))
            return total + weight[:, None] * out, None

        literal, _ = jax.lax.scan(add, x[0], (ffn.experts, (kept / kept.sum(-1, keepdims=True)).T))
        return ffn(x, norm)[0], literal

    np.testing.assert_allclose(*both(packed.block(0), x), rtol=1e-5, atol=1e-5)
    assert type(packed.layers.ffn.router.kernel) is nnx.Param


def test_one_token_has_the_numbers_that_it_has_among_others(prepared):
    """Its gates and ups are one product, those of several tokens a product for each block."""
    layer, x = prepared.block(0), np.sin(np.arange(12 * 32, dtype=np.float32)).reshape(1, 12, 32)
    assert merges_columns(layer.ffn.experts.gate_up_proj)
    run = jax.jit(lambda layer, x: layer.ffn(x, layer.ffn_norm))
    np.testing.assert_allclose(run(layer, x[:, 7:8]), run(layer, x)[:, 7:8], rtol=0, atol=1e-6)


@pytest.mark.covered("rows of experts, by the tests above; explain, by the test below")
def test_decoding_reads_the_chosen_experts_alone(packed, prepared):
    """No operation of the compiled program makes an array of all experts, of one layer or of all."""
    _, cache = prepared.prefill(IDS[:, :11], np.array([11, 11]), 12)
    decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache)).lower(prepared, IDS[:, 11], cache).compile()
    wanted = forward(packed, IDS)[:, 11]
    np.testing.assert_allclose(decode(prepared, IDS[:, 11], cache)[0], wanted, rtol=0, atol=1e-4)
    sizes = {leaf.shape for leaf in jax.tree.leaves(prepared.layers.ffn.experts) if leaf.ndim == 4}
    assert len(sizes) >= 2
    for layers, experts, *rest in sizes:
        for axes in ([layers, experts], [1, experts], [experts]):
            shape = f"[{','.join(map(str, [*axes, *rest]))}]"
            made = [line for line in decode.as_text().splitlines() if f"{shape}{{" in line.partition(" = ")[2][:60]]
            copies = [line for line in made if not any(word in line for word in ("parameter(", "get-tuple-element("))]
            assert not [line for line in copies if "bitcast(" not in line and "tuple(" not in line], shape


def test_explain_counts_the_experts_that_are_read(prepared):
    explanation = explain_model(prepared, 1, 12)
    notes = {step.name: step.not_fused for step in explanation.decode}
    assert notes["experts' down"].startswith("2 of 5 experts a token: one product after the other, 2 of 1 row,")
    assert notes["experts' gate/up"] == "2 of 5 experts a token: their columns are copied side by side"
    prefill = {step.name: step.not_fused for step in explanation.prefill}
    assert "up to 7 of 8 rows" in prefill["experts' gate/up"]
    assert explanation.not_one_kernel == "the kernel of all layers does not compute experts"


def test_a_mesh_leaves_experts_whole_and_says_so(packed):
    plan = plan_shards(packed, {"model": 2})
    assert (plan.attention, plan.ffn) == (True, False)
    assert "feed-forward blocks whole on every device: its experts are not cut" in plan.whole


@pytest.mark.covered("products and gradients, by a test above; training, by nn/test_dot_general.py")
def test_training_at_low_precision_gives_the_packed_block(model):
    """Gradients reach every expert's weights and the router; packing keeps the bits of training."""
    trained = bj.nn.quantization_aware(model.block(0).ffn, [("experts/", "W4A8")])
    x, norm = np.sin(np.arange(12 * 32, dtype=np.float32)).reshape(1, 12, 32), model.block(0).ffn_norm

    def run(ffn, x):
        return ffn(x, norm)

    gradients = jax.jit(nnx.grad(lambda ffn, x: jnp.mean(run(ffn, x) ** 2)))(trained, x)
    kernels = [gradients.experts[name].kernel[...] for name in ("gate_proj", "up_proj", "down_proj")]
    assert all(np.any(np.asarray(kernel), axis=(1, 2)).all() for kernel in kernels)
    assert np.any(np.asarray(gradients.router.kernel[...]))
    np.testing.assert_array_equal(jax.jit(run)(bj.quantize_model(trained), x), jax.jit(run)(trained, x))


def test_files_keep_experts_and_dense_layers(tmp_path):
    some = dataclasses.replace(CONFIG, experts=dataclasses.replace(EXPERTS, dense_layers=(0,)))
    drawn = random_packed(some, Precision.of("W2A8"), key=jax.random.key(0), dtype=jnp.float32)
    assert [run_name(run) for run in drawn.runs] == ["0", "1"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    save_model(tmp_path / "model.safetensors", PretrainedModel(drawn, tokenizer))
    loaded = load_model(tmp_path / "model.safetensors").model
    assert loaded.config == some
    assert loaded.layers["1"].ffn.experts.up_proj.kernel.shape == (1, 5, 32, 24)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(drawn), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.covered("moments of experts, by compress; calibration of blocks, by compress/test_calibrate.py")
def test_calibrated_experts_lose_less_than_rounded_ones(model):
    """Each expert is rounded for the tokens that go to it."""
    rules = [("experts/down_proj", "W2A8")]
    windows = np.random.default_rng(0).integers(0, 40, (8, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrated = calibrate(model, windows, rules, windows_per_step=8)
    wanted = forward(model, windows)
    losses = [np.linalg.norm(forward(each, windows) - wanted) for each in (calibrated, bj.quantize_model(model, rules))]
    assert losses[0] < 0.8 * losses[1]
    with pytest.raises(ValueError, match="tokens may go to other experts: use a Rounding with asymmetry=0"):
        calibrate(model, windows, rules, method=Rounding(asymmetry=0.5))


@pytest.mark.covered("test_calibrated_experts_lose_less_than_rounded_ones")
def test_experts_without_tokens_are_named(model):
    with pytest.warns(UserWarning, match="the same: 3 of 5 of block 0, 3 of 5 of block 1; give more"):
        calibrate(model, IDS[:1, :1], [("experts/", "W4A4")])


def test_what_is_not_computed_beside_experts_is_refused_by_name(model):
    with pytest.raises(ValueError, match="are experts, whose router reads the residual stream in its own basis"):
        rotate(model, key=jax.random.key(0))
    some = dataclasses.replace(CONFIG, experts=dataclasses.replace(EXPERTS, dense_layers=(1,)))
    mixed = nnx.eval_shape(lambda: Transformer(some, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="some layers have experts and some are dense.* quantize_model"):
        calibrate(mixed, IDS, RULES)
    with pytest.raises(ValueError, match="decides no layer|matches no layer that can be quantized.*a router"):
        bj.quantize_model(model, [("router", "W4A8")])
    for fields, message in (
        (dict(per_token=6), "a token cannot run 6 of 5 experts"),
        (dict(dense_layers=(2,)), "indices of the 2 layers"),
        (dict(dense_layers=(0, 1)), "all 2 layers are dense"),
        (dict(ffn_size=0), "experts.ffn_size must be from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, experts=dataclasses.replace(EXPERTS, **fields))

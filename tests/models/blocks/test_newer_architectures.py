"""Windows, caps, norms of heads and norms after blocks: what packs, rotates, smooths, explains and generates."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.inference.explain import explain_model
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.ops import Hadamard
from tests.models.loaders.golden import checkpoints
from tests.support.tiny_transformers import CONFIG, NEWER_ARCHITECTURES, random_ids, random_transformer

PACKED = [("^layers/", bj.Precision(4, 8))]
IDS = random_ids(2, 7)


@pytest.fixture(scope="module")
def models():
    return {name: random_transformer(config) for name, config in NEWER_ARCHITECTURES.items()}


def explained(config, capacity=16, **options):
    model = jax.eval_shape(lambda: join_projections(bj.quantize_model(random_transformer(config), PACKED)))
    return explain_model(model, 1, 8, capacity=capacity, **options)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gemma2", "bitnet"])
@pytest.mark.covered("joined layers, by inference/test_join_projections.py; numbers, by loaders/test_golden_logits.py")
def test_joined_layers_give_the_logits_of_layers_by_themselves(models, name):
    packed = bj.quantize_model(models[name], PACKED)
    prepared = prepare_for_inference(packed)
    assert hasattr(prepared.layers.attention, "qkv_proj")
    assert hasattr(prepared.layers.ffn, "gate_up_proj")
    expected = packed(IDS)
    # A number near the middle of two steps may round to either.
    np.testing.assert_allclose(prepared(IDS), expected, rtol=0, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("cache_bits", [None, 4])
def test_generation_is_that_of_the_full_forward_pass(models, cache_bits):
    """Greedy, beyond the window: the texts that argmax of all logits would write. A cache of 4 bits only runs."""
    model = models["gemma3"]
    prompt = IDS[0].tolist()
    (found,) = generate(model, [prompt], 3, temperature=0.0, cache_bits=cache_bits)
    written = list(found)[-3:]
    assert len(written) == 3
    if cache_bits is None:
        logits = np.asarray(model(np.array([[*prompt, *written]])))[0]
        assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == written


def test_windows_hide_what_lies_before_them():
    """Each of three layers with windows of 3 reaches 2 positions further: the last token depends on 6 before it."""
    model = random_transformer(NEWER_ARCHITECTURES["mistral"])
    ids = np.repeat(random_ids(1, 10), 3, axis=0)
    ids[1, 2], ids[2, 3] = (ids[0, 2] + 1) % CONFIG.vocab_size, (ids[0, 3] + 1) % CONFIG.vocab_size
    first, beyond, within = np.asarray(model(ids))[:, 9]
    np.testing.assert_array_equal(first, beyond)
    assert np.abs(first - within).max() > 0


def test_a_window_that_holds_the_text_is_none():
    wide = dataclasses.replace(CONFIG, window=7)
    np.testing.assert_array_equal(random_transformer(wide)(IDS), random_transformer(CONFIG)(IDS))


@pytest.mark.parametrize("name", ["gemma 3 4b", "phi 4 mini"])
def test_files_keep_what_the_models_compute(name, tmp_path):
    config = checkpoints.read()[name].configs["4"]
    directory = checkpoints.write(tmp_path / "hf", config, checkpoints.make_weights(config), np.float32, 1)
    loaded = load_huggingface(directory)
    save_model(tmp_path / "model.safetensors", loaded)
    again = load_model(tmp_path / "model.safetensors").model
    assert again.config == loaded.model.config
    for first, second in zip(jax.tree.leaves(again), jax.tree.leaves(loaded.model), strict=True):
        np.testing.assert_array_equal(first, second)


def test_qwen3_is_rotated_as_llama_is(models):
    model = models["qwen3"]
    rotated = bj.compress.rotate(model, key=jax.random.key(0))
    assert rotated.config.rotation.ffn is not None
    expected = model(IDS)
    np.testing.assert_allclose(rotated(IDS), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_norms_before_last_projections_leave_the_rotation_of_the_stream(models):
    model = models["bitnet"]
    rotated = bj.compress.rotate(model, key=jax.random.key(0))
    rotation = rotated.config.rotation
    assert (rotation.stream is not None, rotation.ffn, rotation.keys) == (True, None, None)
    expected = model(IDS)
    np.testing.assert_allclose(rotated(IDS), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="rotation.ffn has no place where a norm precedes"):
        dataclasses.replace(model.config, rotation=dataclasses.replace(rotation, ffn=Hadamard((4,), 5)))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_norms_after_blocks_are_why_a_stream_is_not_rotated(models, name):
    with pytest.raises(ValueError, match="the norm attention_post_norm follows attention/o_proj, before the sum"):
        bj.compress.rotate(models[name], key=jax.random.key(0))


@pytest.mark.covered("by test_blocks_one_by_one_are_the_model and the calibration of models of the Llama family")
def test_gemma_is_calibrated_block_by_block(models):
    model = models["gemma3"]
    assert [sites.adds_to_stream for sites in model.block_sites] == [False] * 4
    calibrated = bj.compress.calibrate(model, random_ids(4, 8), [("^layers/", bj.Precision(8, 8))])
    expected = model(IDS)
    assert 0 < np.abs(calibrated(IDS) - expected).max() < 0.1 * np.abs(expected).max()


def test_sites_behind_norms_are_proportional_to_nothing(models):
    for name, expected in (("bitnet", [None, None]), ("gemma3", ["attention/v_proj", "ffn/up_proj"])):
        model = models[name]
        assert [sites.proportional_to for sites in model.block_sites if sites.to_stream] == expected
        for sites in model.block_sites:
            if sites.output_norm is not None:
                assert layer_at(model.block(0), sites.output_norm).scale.shape == (CONFIG.hidden_size,)


@pytest.mark.parametrize(
    ("name", "capacity", "reasons"),
    [
        ("gemma2", 16, ["norms follow the blocks", "scores are capped"]),
        ("gemma3", 16, ["layers rotate by different frequencies", "scores are scaled by 0.3"]),
        ("phi4", 16, ["a part of each head is rotated"]),
        ("bitnet", 16, ["norms precede the last projections", "gates are squared"]),
        ("mistral", 16, ["a window of 3 positions, the cache has 16"]),
    ],
)
def test_explanations_say_why_layers_are_not_one_kernel(name, capacity, reasons):
    found = explained(NEWER_ARCHITECTURES[name], capacity)
    for reason in reasons:
        assert reason in found.not_one_kernel
    steps = [step.name for step in found.decode]
    assert ("norms of q and k" in steps) == NEWER_ARCHITECTURES[name].qk_norm
    assert ("norm of o, sum" in steps, "norm of down, sum" in steps) == (NEWER_ARCHITECTURES[name].post_norms,) * 2


def test_a_window_that_holds_the_cache_is_no_reason():
    wide = dataclasses.replace(CONFIG, window=16)
    assert "window" not in explained(wide, 16).not_one_kernel
    assert "window" in explained(wide, 17).not_one_kernel


def test_attention_is_explained_with_its_cap():
    found = explained(NEWER_ARCHITECTURES["gemma2"])
    attention = next(step for step in found.prefill if step.name == "attention")
    assert "scores are capped" in attention.runs.reason

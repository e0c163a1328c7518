"""Calibration of tiny models: better than rounding, resumable, one compilation for all blocks."""

from __future__ import annotations

import dataclasses
import gc
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.compress import Reconstruction
from bipolar_jax.compress.calibrate import calibrate
from bipolar_jax.compress.reconstruction.reconstruct import update
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.nn import Linear
from tests.support import tiny_checkpoints
from tests.support.tiny_transformers import ARCHITECTURES, random_ids, random_transformer

round_rows = importlib.import_module("bipolar_jax.compress.rounding.round_rows")
calibration = importlib.import_module("bipolar_jax.compress.calibrate")  # the package has a function of this name
RULES = [("embed|lm_head", "W8A16"), ("layers/", "W3A8")]
PROGRAMS = ("enter_blocks", "run_block", "add_moments")
TOKENS = random_ids(12, 16, seed=1)


OTHER_TOKENS = random_ids(8, 16, seed=2)


def loss_of(model, packed, tokens=OTHER_TOKENS) -> float:
    """How much the perplexity's logarithm rises on text that the float model writes itself: the mean KL divergence."""
    ids = jnp.asarray(tokens)
    wanted, found = (jax.nn.log_softmax(each(ids)) for each in (model, packed))
    return float(jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)))


def assert_same_bytes(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


def rotated_model(seed: int):
    return bj.compress.rotate(random_transformer(ARCHITECTURES["llama"]), "foldable", key=jax.random.key(seed))


@pytest.fixture(scope="module")
def model():
    return rotated_model(0)


@pytest.fixture(scope="module")
def calibrated_and_programs(model):
    """The calibrated model; how many programs were compiled for it; and how many of a block's when they first ran."""
    compilations, late = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compilations.append(duration) if "backend_compile" in event else None
    )

    def counted(program):
        def call(*arguments, **static):
            before = len(compilations)
            result = program(*arguments, **static)
            late.append(len(compilations) - before)
            return result

        return call

    programs = {name: getattr(calibration, name) for name in PROGRAMS}
    with pytest.MonkeyPatch.context() as patch:
        for program in programs.values():
            program.clear_cache()
        for name in ("run_block", "add_moments", "packed_kernels", "rounded_block"):
            patch.setattr(calibration, name, counted(getattr(calibration, name)))
        packed = calibrate(model, TOKENS, RULES)
    return packed, {name: program._cache_size() for name, program in programs.items()}, sum(late)


@pytest.fixture(scope="module")
def calibrated(calibrated_and_programs):
    return calibrated_and_programs[0]


def test_calibrated_models_lose_less(model, calibrated):
    assert loss_of(model, calibrated) < 0.6 * loss_of(model, bj.quantize_model(model, RULES))
    layer = calibrated.layers.ffn.down_proj
    assert isinstance(layer, Linear)
    assert str(layer.precision) == "W3A8"
    assert_same_bytes(calibrated.lm_head, bj.quantize_model(model, RULES).lm_head)


def test_all_blocks_run_the_same_programs(calibrated_and_programs):
    _, programs, compiled_late = calibrated_and_programs
    assert programs == {"enter_blocks": 1, "run_block": 1, "add_moments": 4}
    assert compiled_late == 0  # they have been compiled side by side before


@pytest.mark.covered("test_all_blocks_run_the_same_programs; operands, by rounding and rotations")
def test_other_signs_and_bits_run_the_same_programs(model):
    """Of a rotation of another seed, and of other bits of weights: what compiles is packing."""
    rounding = (getattr(round_rows, f"_{name}") for name in ("targets", "grid", "gptq", "refit", "descend", "result"))
    shared = [*(getattr(calibration, name) for name in PROGRAMS), *rounding]
    calibrate(model, TOKENS, RULES)  # compiles what was dropped between tests
    sizes, other = [program._cache_size() for program in shared], rotated_model(1)
    packed = calibrate(other, TOKENS, [RULES[0], ("layers/", "W2A8")])
    assert [program._cache_size() for program in shared] == sizes
    assert packed.config.rotation == other.config.rotation
    scored = [perplexity(each, TOKENS.reshape(-1), windows=4, window_length=16).perplexity for each in (model, other)]
    assert scored[0] == pytest.approx(scored[1], rel=1e-4)  # their function is the same


@pytest.mark.parametrize("name", ["bloom", "opt", "qwen2"])
@pytest.mark.covered("what models say of themselves, by models/test_compressible_blocks.py; Llama, by the tests beside")
def test_every_architecture_is_calibrated(name):
    model = random_transformer(ARCHITECTURES[name], dtype=jnp.bfloat16 if name == "opt" else jnp.float32)
    rules = [("layers/", "W3A8")]
    packed = calibrate(model, TOKENS, rules, method=Rounding(descent_passes=0))
    assert loss_of(model, packed) < 0.8 * loss_of(model, bj.quantize_model(model, rules))


@pytest.mark.covered("the targets, by compress/rounding")
def test_asymmetric_targets_bring_outputs_nearer_to_the_float_model(model):
    def error(asymmetry):
        packed = calibrate(model, TOKENS, [("layers/", "W2A16")], method=Rounding("nearest", asymmetry=asymmetry))
        return float(jnp.mean((packed(TOKENS) - model(TOKENS)) ** 2))

    assert error(1.0) < 0.9 * error(0.0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_calibration_that_is_killed_resumes_with_the_same_bytes(model, calibrated, tmp_path, blocks):
    def kill(finished):
        if finished == blocks:
            raise Killed

    with pytest.raises(Killed):
        calibrate(model, TOKENS, RULES, store=tmp_path, on_block=kill)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [f"block_{index:05d}.safetensors" for index in range(blocks)]
    times = [(tmp_path / name).stat().st_mtime_ns for name in written]
    finished = []
    resumed = calibrate(model, TOKENS, RULES, store=tmp_path, on_block=finished.append)
    assert finished == [1, 2, 3]
    assert [(tmp_path / name).stat().st_mtime_ns for name in written] == times
    assert_same_bytes(resumed, calibrated)
    with pytest.raises(ValueError, match="calibrated with other values of inputs, method: "):
        calibrate(model, TOKENS[:-1], RULES, store=tmp_path, method=Rounding(damping=0.02))


LEARNS = {"reconstruction": Reconstruction(epochs=12, windows_per_update=4, grid_rate=5e-3, target="float_model")}


def test_blocks_that_learn_together_come_nearer_to_the_float_model(model, calibrated, tmp_path):
    """One compiled update serves all blocks."""
    update.clear_cache()
    learned = calibrate(model, TOKENS, RULES, store=tmp_path, **LEARNS)
    assert update._cache_size() == 1
    assert loss_of(model, learned, TOKENS[:8]) < 0.8 * loss_of(model, calibrated, TOKENS[:8])
    with pytest.raises(ValueError, match="other values of method"):
        calibrate(model, TOKENS, RULES, store=tmp_path)
    wild = Reconstruction(epochs=1, windows_per_update=4, code_rate=1e6, grid_rate=1e6)
    with pytest.warns(UserWarning, match="blocks 0, 1, 2 lost more .* lower rates than 1e\\+06 and 1e\\+06"):
        assert_same_bytes(calibrate(model, TOKENS, RULES, reconstruction=wild), calibrated)


@pytest.mark.parametrize("target", ["float_model", "float_block"])
@pytest.mark.covered("the store, by the test of killed calibrations")
def test_blocks_that_learn_together_resume_with_the_same_bytes(model, tmp_path, target):
    learns = {"reconstruction": dataclasses.replace(LEARNS["reconstruction"], target=target)}
    whole = calibrate(model, TOKENS, RULES, store=tmp_path, **learns)
    for index in (1, 2):
        (tmp_path / f"block_{index:05d}.safetensors").unlink()
    assert_same_bytes(calibrate(model, TOKENS, RULES, store=tmp_path, **learns), whole)


def test_what_is_not_reconstructed_is_refused(model):
    for options, message in [
        ({"reconstruction": 8}, "must be a Reconstruction or None, got 8"),
        ({"reconstruction": Reconstruction(), "method": Rounding(nested=(2,))}, r"codes that serve \(2,\) bits"),
        ({"reconstruction": Reconstruction(), "cache_bits": 8}, "keys of a cache of 8 bits have no gradients"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate(model, TOKENS, RULES, **options)
    with pytest.raises(ValueError, match="a Linear has no blocks to reconstruct"):
        calibrate(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), np.ones((2, 4)), [("", "W4A8")], reconstruction=Reconstruction())
    for name, value in {"epochs": 0, "windows_per_update": 1.5, "code_rate": -1.0, "grid_rate": True}.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            Reconstruction(**{name: value})
    with pytest.raises(ValueError, match="target must be one of float_model, float_block, got 'logits'"):
        Reconstruction(target="logits")
    with pytest.raises(ValueError, match="learn_groups must be True or False"):
        Reconstruction(learn_groups=1)


def test_memory_holds_one_state_of_all_windows(model):
    """Arrays that live between blocks: the states, and packed layers; neither float blocks nor second moments."""
    before = sum(array.nbytes for array in jax.live_arrays())
    live = []

    def measure(_):
        gc.collect()
        live.append(sum(array.nbytes for array in jax.live_arrays()) - before)

    calibrate(model, TOKENS, RULES, on_block=measure)
    packed = sum(leaf.nbytes for leaf in jax.tree.leaves(bj.quantize_model(model, RULES).block(0)))
    outside = bj.quantize_model(model, RULES[:1])
    others = sum(leaf.nbytes for leaf in jax.tree.leaves((outside.embed, outside.lm_head)))
    states = sum(leaf.nbytes for leaf in jax.tree.leaves([model.enter_blocks(TOKENS[:4])] * 3))
    for blocks, size in enumerate(live, 1):
        assert size <= states + others + blocks * packed + TOKENS.nbytes


@pytest.mark.covered("experiments/test_calibrate.py, whose rules come from a file")
def test_rules_choose_layers_and_files_keep_them(tmp_path):
    tokenizer = tiny_checkpoints.make_tokenizer("smollm")
    config = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=tokenizer.get_vocab_size())
    model = random_transformer(config)
    rules = [("k_proj", None), ("v_proj", "W8A8"), ("q_proj|gate", "W2A8g8f"), ("o_proj", "W2A16"), ("down", "W1A4g4")]
    packed = calibrate(model, TOKENS, rules, method=Rounding(descent_passes=0))
    attention, ffn = packed.layers.attention, packed.layers.ffn
    found = [attention.k_proj, attention.v_proj, attention.q_proj, ffn.gate_proj, attention.o_proj, ffn.down_proj]
    names = [str(layer.precision) if isinstance(layer, Linear) else None for layer in found]
    assert names == [None, "W8A8", "W2A8g8f", "W2A8g8f", "W2A16", "W1A4g4"]
    assert not isinstance(ffn.up_proj, Linear)
    save_model(tmp_path / "packed.safetensors", PretrainedModel(packed, tokenizer))
    assert_same_bytes(load_model(tmp_path / "packed.safetensors").model, packed)


def test_wrong_arguments_are_named(model):
    for tokens in (TOKENS[0], (TOKENS, TOKENS)):
        with pytest.raises(ValueError, match=r"needs tokens \[windows, length\]"):
            calibrate(model, tokens, RULES)
    with pytest.raises(ValueError, match="needs at least 1 window"):
        calibrate(model, TOKENS[:0], RULES)
    with pytest.raises(ValueError, match=r"cache_bits is 6, but the model keeps caches of \(8, 4\) bits"):
        calibrate(model, TOKENS, RULES, cache_bits=6)
    with pytest.raises(ValueError, match="the nearest paths are"):
        calibrate(model, TOKENS, [("layer/", "W4A8")])
    with pytest.raises(ValueError, match="token ids span 0..37, outside the vocabulary 0..36"):
        calibrate(model, np.where(TOKENS > 35, 37, TOKENS), RULES)
    with pytest.raises(ValueError, match="windows of 48 tokens exceed the model's context of 32"):
        calibrate(model, TOKENS.reshape(4, 48), RULES)
    with pytest.raises(ValueError, match="method must be a Rounding"):
        calibrate(model, TOKENS, RULES, method="gptq")
    with pytest.raises(ValueError, match="got a tuple: give an nnx.Module"):
        calibrate((model,), TOKENS, RULES)
    with pytest.raises(ValueError, match="is a file: give a folder"):
        calibrate(model, TOKENS, RULES, store=__file__)
    with pytest.raises(ValueError, match="nested precisions have fewer bits than W3A8"):
        calibrate(model, TOKENS, RULES, method=Rounding(nested=[6, 4]))
    with pytest.raises(ValueError, match="group_size must be"):
        calibrate(model, TOKENS, [("layers/", "W4A8g4096")])


def test_numbers_that_are_not_finite_are_named():
    """A compiled program would pass them on, into a packed model of NaN."""
    config = dataclasses.replace(ARCHITECTURES["llama"], num_layers=2)
    kernels, norms = random_transformer(config), random_transformer(config)
    kernel, scale = kernels.layers.ffn.up_proj.kernel, norms.layers.attention_norm.scale
    kernels.layers.ffn.up_proj.kernel = kernel.replace(kernel[...].at[1, 0, 0].set(jnp.nan))
    norms.layers.attention_norm.scale = scale.replace(scale[...].at[0, 3].set(jnp.inf))
    with pytest.raises(ValueError, match="the kernel of ffn/up_proj of block 1 has 1 NaN or Inf"):
        calibrate(kernels, TOKENS, RULES)
    with pytest.raises(ValueError, match="what enters attention/q_proj, .* of block 0 has NaN or Inf"):
        calibrate(norms, TOKENS, RULES, method=Rounding("nearest"))

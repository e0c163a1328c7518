"""Rotary embeddings: every published frequency rule, written out a second time, and what rotation preserves."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.models.blocks.rope import rope_frequencies, rope_tables, rotate
from bipolar_jax.models.config import RopeScaling, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    ffn_size=5,
    context_length=8192,
)
# (head_dim, theta, scaling) as published models have them, and one small case of each rule.
LLAMA3 = (128, 5e5, RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0))
QWEN_YARN = (128, 1e6, RopeScaling("yarn", 4.0, 32768))
CASES = {
    "none": (16, 1e4, None),
    "linear": (16, 1e4, RopeScaling("linear", 2.5)),
    "llama3": (16, 1e4, RopeScaling("llama3", 3.0, 512, low_freq_factor=2.0, high_freq_factor=5.0)),
    "llama-3.1": LLAMA3,
    "yarn": (32, 1e4, RopeScaling("yarn", 6.0, 1024, beta_fast=16.0, beta_slow=2.0)),
    "yarn-qwen": QWEN_YARN,
    "factors": (8, 1e4, RopeScaling("factors", factors=(1.0, 1.5, 8.0, 32.0))),
}


def config_of(head_dim: int, theta: float, scaling: RopeScaling | None) -> TransformerConfig:
    return dataclasses.replace(CONFIG, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    """The three cases of Hugging Face's `_compute_llama3_parameters`, by wavelength."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_context_length / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_context_length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_context_length / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def yarn_frequency(frequency: float, index: int, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """Hugging Face's `_compute_yarn_parameters`: interpolation where the ramp is 1, extrapolation where it is 0."""

    def correction_dim(rotations):
        wavelengths = scaling.original_context_length / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(scaling.beta_fast)), 0)
    high = min(math.ceil(correction_dim(scaling.beta_slow)), head_dim - 1)
    ramp = min(max((index - low) / (high - low), 0.0), 1.0)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def expected_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    frequencies = []
    for index in range(head_dim // 2):
        frequency = 1.0 / theta ** (2 * index / head_dim)  # RoFormer, section 3.2.2
        if scaling is not None:
            frequency = {
                "linear": lambda f: f / scaling.factor,
                "llama3": lambda f: llama3_frequency(f, scaling),
                "yarn": lambda f, i=index: yarn_frequency(f, i, head_dim, theta, scaling),
                "factors": lambda f, i=index: f / scaling.factors[i],
            }[scaling.kind](frequency)
        frequencies.append(frequency)
    return np.array(frequencies)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_frequencies_are_those_of_the_papers(case):
    frequencies, _ = rope_frequencies(config_of(*case))
    assert frequencies.dtype == np.float64
    # Both sides are float64; a handful of roundings each.
    np.testing.assert_allclose(frequencies, expected_frequencies(*case), rtol=1e-14)


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), [LLAMA3, QWEN_YARN], ids=["llama3", "yarn"])
def test_band_rules_keep_the_fast_half_and_stretch_the_slow(head_dim, theta, scaling):
    base = expected_frequencies(head_dim, theta, None)
    ratio = rope_frequencies(config_of(head_dim, theta, scaling))[0] / base
    np.testing.assert_allclose([ratio[0], ratio[-1]], [1, 1 / scaling.factor], rtol=1e-14)
    assert (np.diff(ratio) <= 1e-14).all()
    assert ((ratio < 1 - 1e-9) & (ratio > 1 / scaling.factor + 1e-9)).any(), "nothing is interpolated"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_only_yarn_changes_the_attention_factor(case):
    _, attention_factor = rope_frequencies(config_of(*case))
    scaling = case[2]
    yarn = scaling is not None and scaling.kind == "yarn"
    assert attention_factor == (pytest.approx(0.1 * math.log(scaling.factor) + 1) if yarn else 1)


def test_a_given_attention_factor_wins():
    scaling = RopeScaling("yarn", 6.0, 1024, attention_factor=0.75)
    cos, sin = rope_tables(config_of(16, 1e4, scaling), jnp.arange(40)[None])
    # cos^2 + sin^2 = factor^2; each of cos, sin is rounded a few times in float32.
    np.testing.assert_allclose(cos**2 + sin**2, 0.75**2, rtol=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tables_are_cosines_and_sines_of_position_times_frequency(case):
    positions = np.array([[0, 1, 7], [100, 4095, 8191]])
    config = config_of(*case)
    angles = positions[..., None] * expected_frequencies(*case)
    attention_factor = rope_frequencies(config)[1]
    # The frequency and the product are rounded, 2^-24 of the angle each; cos, sin and the factor once more.
    tolerance = angles * 2**-23 + 4 * 2**-24 * attention_factor
    for table, exact in zip(rope_tables(config, jnp.asarray(positions)), (np.cos(angles), np.sin(angles)), strict=True):
        assert table.dtype == jnp.float32
        assert (np.abs(table - exact * attention_factor) <= tolerance * attention_factor).all()


def rotated(x: np.ndarray, positions: np.ndarray, config: TransformerConfig = CONFIG) -> np.ndarray:
    return np.asarray(rotate(jnp.asarray(x), rope_tables(config, jnp.asarray(positions))))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rotation_multiplies_the_complex_pairs_of_the_two_halves():
    x, positions = normal(2, 3, 4, 16), np.array([[0, 1, 2], [9, 30, 5]])
    angles = positions[..., None, None] * expected_frequencies(16, 1e4, None)
    pairs = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)
    # Angles up to 30 in float32 are off by 30 * 2^-23 = 4e-6; |x| is below 4.
    np.testing.assert_allclose(rotated(x, positions), np.concatenate([pairs.real, pairs.imag], -1), atol=2e-5)


def test_position_zero_is_left_alone():
    x = normal(1, 1, 2, 16)
    np.testing.assert_array_equal(rotated(x, np.array([[0]])), x)


def test_rotation_preserves_norms():
    x = normal(1, 50, 2, 16)
    norms = np.linalg.norm(rotated(x, np.arange(50)[None]), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("distance", [0, 1, 13, 200])
def test_scores_depend_on_the_distance_only(distance):
    q, k = normal(1, 1, 1, 16, seed=1), normal(1, 1, 1, 16, seed=2)
    starts = [0, 1, 50, 600]
    scores = [
        float(np.sum(rotated(q, np.array([[start + distance]])) * rotated(k, np.array([[start]])))) for start in starts
    ]
    # Angles up to 800 in float32 are off by 800 * 2^-23 = 1e-4 each; |q| |k| is about 16.
    np.testing.assert_allclose(scores, scores[0], atol=3e-3)
    farther = [float(np.sum(rotated(q, np.array([[distance + more]])) * k)) for more in (1, 3, 5)]
    assert np.ptp([scores[0], *farther]) > 0.1, "the distance must matter"


def test_rotation_keeps_the_dtype_and_rounds_once():
    x = jnp.asarray(normal(1, 5, 2, 16), jnp.bfloat16)
    tables = rope_tables(CONFIG, jnp.arange(5)[None])
    turned = rotate(x, tables)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), tables).astype(jnp.bfloat16))


@pytest.mark.parametrize("count", [1, 7, 9])
def test_explicit_factors_must_be_one_for_each_frequency(count):
    with pytest.raises(ValueError, match=f"RoPE has {count} explicit factors; 16 rotated numbers of a head need 8"):
        rope_frequencies(config_of(16, 1e4, RopeScaling("factors", factors=(1.0,) * count)))

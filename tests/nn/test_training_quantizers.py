"""Quantizers, losses and schedules for training, each compared with the formulas of its paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarFormat, DotGeneral, Precision, fake_quant, quantize
from bipolar_jax.nn import BitSchedule, distillation_loss
from bipolar_jax.quantize.clipping import clip_tokens
from bipolar_jax.quantize.groups import group_lengths
from bipolar_jax.quantize.learned_step import fake_quant_by_step_size, initial_step_size, round_by_step_size
from bipolar_jax.quantize.stochastic import stochastic_round
from bipolar_jax.quantize.weight_norm import normalize_weights
from tests.support.integer_products import normal

FORMATS = [*(BipolarFormat(bits) for bits in (1, 2, 4, 8)), TERNARY]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
ROWS, K = 3, 12


# Learned steps


def per_element(per_group, group_size):
    """Repeats the number of each group for the elements of the group."""
    return np.repeat(per_group, group_size or K, axis=-1)[:, :K]


def rounded(w, step, fmt: BipolarFormat, group_size):
    """Equations 1 and 2 of arXiv 1902.08153 on the format's levels, round(clip(w / s, -Q, Q)) * s, in float64."""
    levels = fmt.grid() / 2
    u = np.clip(w / per_element(step, group_size), levels[0], levels[-1])
    nearest = levels[np.argmin(np.abs(u[..., None] - levels), axis=-1)]
    return nearest * per_element(step, group_size)


@every_format
@pytest.mark.parametrize("group_size", [None, 5])
def test_learned_steps_round_as_in_the_paper(fmt, group_size):
    w = normal(ROWS, K)
    step = initial_step_size(w, fmt, group_size)
    np.testing.assert_allclose(
        fake_quant_by_step_size(w, step, fmt, group_size), rounded(w, np.asarray(step), fmt, group_size), rtol=1e-6
    )
    codes, scale = round_by_step_size(w, step, fmt, group_size)
    np.testing.assert_array_equal(scale, step / 2)
    decoded = np.asarray(fmt.values(codes)) * per_element(np.asarray(scale), group_size)
    np.testing.assert_allclose(decoded, rounded(w, np.asarray(step), fmt, group_size), rtol=1e-6)


@every_format
def test_initial_steps_are_twice_the_mean_magnitude_over_the_root_of_q(fmt):
    w = normal(ROWS, K)
    for group_size, groups in ((None, [slice(0, K)]), (5, [slice(0, 5), slice(5, 10), slice(10, K)])):
        expected = [[2 * np.abs(row[g]).mean() / np.sqrt(fmt.max_value / 2) for g in groups] for row in w]
        np.testing.assert_allclose(initial_step_size(w, fmt, group_size), expected, rtol=1e-6)


@every_format
@pytest.mark.parametrize("group_size", [None, 5])
def test_gradients_of_steps_and_weights_are_those_of_the_paper(fmt, group_size):
    """Compares with central differences in float64 of the paper's surrogate, at every element.

    Straight-through rounding treats c = round(u) - u as a constant, so the surrogate is
    s * (clip(w / s) + c). It is smooth except at the ends of the range.
    """
    w = normal(ROWS, K).astype(np.float64)
    step = 1.1 * np.asarray(initial_step_size(w.astype(np.float32), fmt, group_size), np.float64)
    largest = fmt.max_value / 2
    clipped = lambda w, step: np.clip(w / per_element(step, group_size), -largest, largest)  # noqa: E731
    constant = rounded(w, step, fmt, group_size) / per_element(step, group_size) - clipped(w, step)
    cotangent = normal(ROWS, K, seed=1).astype(np.float64)

    def surrogate(w, step):
        return np.sum(cotangent * per_element(step, group_size) * (clipped(w, step) + constant))

    def differences(which):
        arguments, gradient = [w, step], np.zeros_like((w, step)[which])
        for index in np.ndindex(gradient.shape):
            ends = []
            for move in (1e-6, -1e-6):
                moved = [a.copy() for a in arguments]
                moved[which][index] += move
                ends.append(surrogate(*moved))
            gradient[index] = (ends[0] - ends[1]) / 2e-6
        return gradient

    loss = lambda w, step: jnp.sum(fake_quant_by_step_size(w, step, fmt, group_size) * cotangent)  # noqa: E731
    by_w, by_step = jax.grad(loss, argnums=(0, 1))(jnp.asarray(w, jnp.float32), jnp.asarray(step, jnp.float32))
    balance = 1 / np.sqrt(group_lengths(K, group_size) * largest)  # section 2.2
    np.testing.assert_allclose(by_w, differences(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_step, differences(1) * balance, rtol=1e-4, atol=1e-4)


def test_a_step_that_is_not_positive_counts_as_zero_and_has_a_gradient():
    w = normal(ROWS, K)
    for value in (0.0, -1.0):
        step = jnp.full((ROWS, 1), value)
        np.testing.assert_array_equal(fake_quant_by_step_size(w, step, TERNARY, None), np.zeros_like(w))
        gradient = jax.grad(lambda step: jnp.sum(fake_quant_by_step_size(w, step, TERNARY, None) * w))(step)
        assert np.all(np.asarray(gradient) > 0)
        assert np.all(np.isfinite(gradient))


# Calibration and normalization


@pytest.mark.parametrize("group_size", [None, 5])
def test_absmean_of_ternary_weights_is_that_of_bitnet(group_size):
    """arXiv 2402.17764, equations 1 to 3: round(clip(w / gamma, -1, 1)) * gamma, gamma the mean magnitude."""
    w = normal(ROWS, K)
    gamma = np.stack([np.abs(w[:, i : i + (group_size or K)]).mean(axis=-1) for i in range(0, K, group_size or K)], -1)
    expected = np.round(np.clip(w / per_element(gamma, group_size), -1, 1)) * per_element(gamma, group_size)
    packed = quantize(w, TERNARY, -1, group_size, "absmean", scales="float")
    np.testing.assert_allclose(packed.dequantize(), expected, rtol=1e-5)


def test_absmean_of_one_bit_is_that_of_xnor_net():
    """arXiv 1603.05279, section 3.1: sign(w) times the mean magnitude."""
    w = normal(ROWS, K)
    expected = np.sign(w) * np.abs(w).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(quantize(w, 1, -1, calibration="absmean").dequantize(), expected, rtol=1e-6)


def test_absmean_of_a_row_with_nan_is_nan():
    w = normal(ROWS, K)
    w[1, 2] = np.nan
    packed = jax.jit(lambda w: quantize(w, 1, -1, calibration="absmean"))(w)
    assert np.isnan(packed.scale[1])
    assert np.all(np.isfinite(packed.scale[np.array([0, 2])]))


def test_clip_gradient_false_keeps_the_gradient_of_clipped_weights():
    w = np.array([[0.1, -0.1, 0.1, 9.0]], np.float32)
    for clip, expected in ((True, [1, 1, 1, 0]), (False, [1, 1, 1, 1])):
        gradient = jax.grad(lambda w, c=clip: fake_quant(w, 1, -1, None, "absmean", c).sum())(w)
        np.testing.assert_array_equal(gradient[0], expected)


def test_weights_are_centered_or_standardized():
    w = 3 + 2 * normal(2, K, 5)
    centered = normalize_weights(w, "center")
    np.testing.assert_allclose(centered, w - w.mean(axis=(1, 2), keepdims=True), atol=1e-5)
    standard = normalize_weights(w, "standardize")
    np.testing.assert_allclose(standard.mean(axis=1), np.zeros((2, 5)), atol=1e-5)
    np.testing.assert_allclose(standard.std(axis=1), np.ones((2, 5)), atol=1e-5)
    assert normalize_weights(w, None) is w
    assert np.all(np.isfinite(normalize_weights(jnp.ones((K, 5)), "standardize")))


@pytest.mark.parametrize("weight_norm", ["center", "standardize"])
def test_dot_general_multiplies_with_normalized_weights_and_their_gradient(weight_norm):
    x, w = normal(4, K), normal(K, 5, seed=1)
    dot = DotGeneral(1, calibration="absmean", weight_norm=weight_norm, clip_gradient=False)
    numbers = (((1,), (0,)), ((), ()))

    def plain(w):
        rounded = fake_quant(normalize_weights(w, weight_norm), 1, -2, None, "absmean", False)
        return jnp.sum(jnp.dot(x, rounded, precision="highest") ** 2)

    ours = jax.value_and_grad(lambda w: jnp.sum(dot(x, w, numbers) ** 2))(w)
    theirs = jax.value_and_grad(plain)(w)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_dot_general_multiplies_with_learned_steps_and_returns_their_gradient():
    x, w = normal(4, K), normal(K, 5, seed=1)
    dot, numbers = DotGeneral(2, group_size=5, scales="float"), (((1,), (0,)), ((), ()))
    step = 0.7 * dot.initial_step_size(w)

    def plain(w, step):
        rounded = fake_quant_by_step_size(w.T, step, BipolarFormat(2), 5).T
        return jnp.sum(jnp.dot(x, rounded, precision="highest") ** 2)

    ours = jax.value_and_grad(lambda w, step: jnp.sum(dot(x, w, numbers, step_size=step) ** 2), argnums=(0, 1))(w, step)
    theirs = jax.value_and_grad(plain, argnums=(0, 1))(jnp.asarray(w), step)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# Stochastic rounding


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, -1])
def test_stochastic_rounding_keeps_the_mean_and_rounds_to_its_grid(bits, axis):
    x = normal(6, 5)
    steps = 2 ** (bits - 1) - 1
    step = np.abs(x).max(axis=axis, keepdims=True) / steps
    samples = jax.vmap(lambda key: stochastic_round(x, bits, axis, key))(jax.random.split(jax.random.key(0), 2000))
    levels = np.asarray(samples) / step
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert np.abs(levels).max() <= steps + 1e-4
    # 5 standard errors of a mean of 2000 samples whose standard deviation is at most half a step.
    assert np.all(np.abs(samples.mean(axis=0) - x) < 5 * 0.5 * step / np.sqrt(2000) + 1e-5)


def test_stochastic_rounding_of_zeros_is_zero():
    np.testing.assert_array_equal(stochastic_round(jnp.zeros((2, 3)), 8, -1, jax.random.key(0)), np.zeros((2, 3)))


# Distillation and schedules


def test_distillation_loss_is_the_divergence_of_softened_distributions():
    student, teacher, temperature = normal(2, 3, 7), normal(2, 3, 7, seed=1), 4.0
    soften = lambda z: np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True)  # noqa: E731
    p, q = soften(teacher.astype(np.float64)), soften(student.astype(np.float64))
    divergence = np.sum(p * np.log(p / q), axis=-1) * temperature**2
    np.testing.assert_allclose(distillation_loss(student, teacher, temperature), divergence.mean(), rtol=1e-4)
    where = np.array([[True, False, True], [False, False, True]])
    np.testing.assert_allclose(
        distillation_loss(student, teacher, temperature, jnp.asarray(where)), divergence[where].mean(), rtol=1e-4
    )
    assert abs(distillation_loss(teacher, teacher, temperature)) < 1e-5


def test_distillation_gradient_is_that_of_the_paper():
    """Equation 2 of arXiv 1503.02531: T^2 * (q - p) / T for the student's logits; 0 for the teacher's."""
    student, teacher = normal(7), normal(7, seed=1)
    by_student, by_teacher = jax.grad(lambda s, t: distillation_loss(s, t, 2.0), argnums=(0, 1))(student, teacher)
    expected = 2.0 * (jax.nn.softmax(student / 2) - jax.nn.softmax(teacher / 2))
    np.testing.assert_allclose(by_student, expected, atol=1e-6)
    np.testing.assert_array_equal(by_teacher, np.zeros(7))


def test_teacher_logits_of_minus_infinity_give_a_finite_loss():
    teacher = jnp.array([0.0, 1.0, -jnp.inf])
    value, gradient = jax.value_and_grad(distillation_loss)(jnp.zeros(3), teacher)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.isnan(distillation_loss(jnp.zeros(3), teacher.at[0].set(jnp.nan)))


def test_a_schedule_uses_each_precision_up_to_the_next_stage():
    schedule = BitSchedule([(0, None), (10, Precision(4, 8)), (20, Precision(1, 2))])
    assert [schedule.at(step) for step in (0, 9, 10, 19, 20, 99)] == [
        None,
        None,
        Precision(4, 8),
        Precision(4, 8),
        Precision(1, 2),
        Precision(1, 2),
    ]
    assert schedule.changes == (0, 10, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BitSchedule([]), r"begin at step 0.*got steps \[\]"),
        (lambda: BitSchedule([(5, None)]), r"got steps \[5\]"),
        (lambda: BitSchedule([(0, None), (0, None)]), r"got steps \[0, 0\]"),
        (lambda: BitSchedule([(0, "W4A8")]), "step 0 has 'W4A8': give a Precision"),
        (lambda: BitSchedule([(0, None)]).at(-1), "negative, got -1"),
        (lambda: distillation_loss(jnp.ones((2, 3)), jnp.ones((2, 4))), r"\(2, 3\) and .* \(2, 4\) differ"),
        (lambda: distillation_loss(jnp.ones(3), jnp.ones(3), 0), "above 0, got 0"),
        (lambda: distillation_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), where=jnp.ones(3, bool)), r"need \(2,\)"),
        (lambda: stochastic_round(jnp.ones(3), 9, -1, jax.random.key(0)), "from 2 to 8, got 9"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_clip_tokens_bounds_numbers_by_the_mean_magnitude_of_their_token():
    x = jnp.asarray([[1.0, -2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(clip_tokens(x, 1.0), [[1, -2, 3, 3], [0, 0, 0, 0]])
    gradient = jax.grad(lambda x: clip_tokens(x, 1.0).sum())(x)
    np.testing.assert_array_equal(gradient, [[1, 1, 1, 0], [1, 1, 1, 1]])  # none beyond the bound


def test_one_bit_activations_clipped_at_1_have_the_least_squares_scale():
    """The token becomes sign(x) times its mean magnitude (arXiv 1603.05279, equation 6)."""
    x = jax.random.normal(jax.random.key(0), (5, 64))
    ones = jnp.ones((64, 1))
    y = DotGeneral(1, 1, clip_activations=1.0)(x, ones, (((1,), (0,)), ((), ())))
    expected = (jnp.sign(x) * jnp.mean(jnp.abs(x), axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize(("ratio", "a_bits"), [(0.0, 2), (float("inf"), 2), (1.0, None)])
def test_errors_of_clip_activations(ratio, a_bits):
    with pytest.raises(ValueError, match="clip_activations"):
        DotGeneral(2, a_bits, clip_activations=ratio)

"""Distillation after rounding: stand-ins compute what packed layers do, learn, and become packed layers again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.compress.distillation.distill import DistillationState, Schedule, Step, window_loss
from bipolar_jax.compress.distillation.latent_weights import LatentWeights
from bipolar_jax.compress.distillation.learning_layers import MatrixRotation, float_product, quantized_product
from bipolar_jax.compress.distillation.learning_model import Student, is_latent, learning_model, packed_again
from bipolar_jax.compress.reconstruction.learned_grid import INSIDE
from bipolar_jax.format import TERNARY
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.packing import quantize
from tests.support.tiny_transformers import ARCHITECTURES, random_ids, random_transformer

EMBEDDING = ("^(embed|lm_head)$", "W8A16")
IDS = random_ids(4, 12)
SCHEDULE = Schedule(steps=80, learning_rate=1e-2, warmup=3)
forward = jax.jit(lambda model, ids: model(ids))


def packed_of(model, precision):
    return bj.quantize_model(model, [EMBEDDING, ("^layers/", precision)])


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("opt", "W2A8g16f"), ("llama", "W4A8g16"), ("qwen2", "W3A8"), ("bloom", "W4A16")],
)
@pytest.mark.sample(1)
def test_a_learning_model_computes_what_the_packed_one_does_and_becomes_it_again(architecture, precision):
    model = random_transformer(ARCHITECTURES[architecture])
    packed = packed_of(model, precision)
    learning = learning_model(packed, model)
    wanted, found = forward(packed, IDS), forward(learning, IDS)
    # Float32 sums in another order; a token that is quantized a step apart moves logits by more: none does here.
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(np.abs(wanted).max()))
    again = packed_again(learning, packed)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    for (path, one), (_, other) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (again, packed)), strict=True):
        one, other = map(jax.tree.leaves, (one.get_value(), other.get_value()))
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), path


@pytest.mark.parametrize(
    ("bits", "group_size", "scales", "calibration"),
    [(4, 8, "integer", None), (2, 8, "float", None), (3, None, None, "absmax"), (TERNARY, None, None, "absmean")],
)
def test_latent_weights_start_within_their_cells_and_have_the_gradients_of_the_paper(
    bits, group_size, scales, calibration
):
    """Against the derivatives in float64 numpy, cell by cell."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((20, 6)).astype(np.float32)
    packed = quantize(jnp.asarray(floats), bits, -2, group_size, calibration, scales)
    latent = LatentWeights.of(packed, jnp.asarray(floats))
    np.testing.assert_array_equal(latent.codes(), packed.codes())
    numbers = np.asarray(packed.dequantize()).T
    np.testing.assert_allclose(latent.numbers(), numbers, atol=1e-6)
    scale, offset = (None if a is None else np.asarray(a, np.float64) for a in latent.grid())
    size = group_size or 20
    scale = np.repeat(scale, size, axis=-1)[:, :20]
    offset = np.zeros_like(scale) if offset is None else np.repeat(offset, size, axis=-1)[:, :20]
    assert np.all(np.abs(latent.rows - numbers) <= 2 * INSIDE * scale * 1.0001)
    close = np.abs(floats.T - numbers) < 2 * INSIDE * scale * 0.999
    np.testing.assert_array_equal(np.asarray(latent.rows)[close], floats.T[close])

    moved = dataclasses.replace(latent, rows=latent.rows * 1.5 + 0.1)  # some beyond the grid
    cotangent = rng.standard_normal((6, 20)).astype(np.float32)
    by_rows, by_scale, by_offset = jax.grad(
        lambda rows, scale, offset: jnp.sum(
            cotangent * dataclasses.replace(moved, rows=rows, scale=scale, offset=offset).numbers()
        ),
        argnums=(0, 1, 2),
        allow_int=True,
    )(moved.rows, moved.scale, moved.offset)
    largest = packed.format.max_value
    z = (np.asarray(moved.rows, np.float64) - offset) / scale
    values = np.asarray(packed.format.values(moved.codes()), np.float64)
    inside = np.abs(z) <= largest + 1
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(by_rows, cotangent * inside, atol=1e-6)

    def sums(of_each):
        padded = np.pad(cotangent * of_each, [(0, 0), (0, -20 % size)])
        return padded.reshape(6, -1, size).sum(axis=-1)

    if packed.groups is not None:  # one scale a row: d/dS of S * value(u), value = s u + o
        value, unit = numbers_over(packed, moved), 1 << (8 - packed.format.bits)
        expected = (cotangent * np.where(inside, value - moved.rows / packed.scale, value)).sum(axis=-1)
        np.testing.assert_allclose(by_scale[:, 0] * unit, expected, rtol=2e-4, atol=2e-3)
    else:
        np.testing.assert_allclose(by_scale, sums(np.where(inside, values - z, values)), rtol=1e-4, atol=1e-4)
        if moved.offset is not None:
            np.testing.assert_allclose(by_offset, sums(~inside), atol=1e-5)


def numbers_over(packed, latent):
    """s u + o of the latent codes."""
    return np.asarray(packed.groups.values(latent.codes(), packed.group_size), np.float64)


@pytest.fixture(scope="module")
def distilled():
    """A model at few bits, taught for a few steps."""
    model = random_transformer(ARCHITECTURES["qwen2"])
    packed = packed_of(model, "W3A8g16")
    student = Student(learning_model(packed, model))
    step = Step(student, model)
    step.compile(*IDS.shape)
    state, losses = DistillationState.of(student.params), []
    for done in range(SCHEDULE.steps):
        state, metrics = step(state, IDS, SCHEDULE, done)
        losses.append({name: float(value) for name, value in metrics.items()})
        if done == 0:
            moved = {name: np.abs(np.asarray(state.params[name] - value)) for name, value in student.params.items()}
    losses[0]["moved"] = moved
    return model, packed, student, state, losses


def test_the_loss_falls_from_that_of_the_packed_model(distilled):
    model, packed, _student, _state, losses = distilled
    wanted, found = (np.asarray(forward(m, IDS), np.float64) for m in (model, packed))
    logs = [logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)) for logits in (wanted, found)]
    assert losses[0]["loss"] == pytest.approx(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)), rel=1e-3)
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]


def test_devices_divide_the_windows_of_a_step(distilled):
    model, _packed, student, _state, losses = distilled
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step, state = Step(student, model, mesh=mesh), DistillationState.of(student.params)
    step.compile(*IDS.shape)
    for done in range(2):
        state, metrics = step(state, IDS, SCHEDULE, done)
        for name, value in metrics.items():
            assert float(value) == pytest.approx(losses[done][name], rel=1e-4), (done, name)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(state))


def test_the_packed_result_has_the_learned_models_logits(distilled):
    model, packed, student, state, _losses = distilled
    learned = student.model(state.params)
    result = packed_again(learned, packed)
    wanted = forward(learned, IDS)
    np.testing.assert_allclose(forward(result, IDS), wanted, atol=3e-5 * float(np.abs(wanted).max()))
    assert float(window_loss(result, model, jnp.asarray(IDS))) == pytest.approx(
        float(window_loss(learned, model, jnp.asarray(IDS))), rel=1e-3
    )
    before, after = (m.layers.attention.q_proj.kernel.get_value() for m in (packed, result))
    assert not np.array_equal(before.codes(), after.codes())
    assert not np.array_equal(before.scale, after.scale)
    assert np.array_equal(before.groups.scale, after.groups.scale), "integer groups stay"
    assert not np.array_equal(packed.final_norm.scale[...], result.final_norm.scale[...])
    assert np.array_equal(packed.embed.embedding.get_value().planes, result.embed.embedding.get_value().planes)


@pytest.mark.covered("their gradients, by tests/quantize")
def test_integers_of_groups_learn_where_they_are_asked_to():
    """With the gradients of float groups, times what S has become; the packed result has the same integers."""
    model = random_transformer(ARCHITECTURES["llama"])
    packed = packed_of(model, "W3A8g16")
    kernel = packed.layers.attention.q_proj.kernel.get_value()
    latent = LatentWeights.of(kernel, model.layers.attention.q_proj.kernel[...]).with_latent_groups()
    np.testing.assert_array_equal(latent.codes(), kernel.codes())
    for one, other in zip(*map(jax.tree.leaves, (latent.packed(), kernel)), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=1e-6)

    weights = jnp.asarray(np.random.default_rng(1).standard_normal(latent.rows.shape), jnp.float32)
    scale, offset = latent.grid()
    floats = dataclasses.replace(latent, groups=None)

    def of_floats(scale, offset):
        return jnp.sum(weights * dataclasses.replace(floats, scale=scale, offset=offset).numbers())

    by_scale, by_offset = jax.grad(of_floats, argnums=(0, 1))(scale, offset)
    found = jax.grad(lambda groups: jnp.sum(weights * dataclasses.replace(latent, groups=groups).numbers()))(
        latent.groups
    )
    # A float group's offset is that of value 0, the middle of the codes: S (o + s W / 2).
    np.testing.assert_allclose(found.offset, by_offset, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.scale, by_scale + kernel.format.max_value * by_offset, rtol=1e-4, atol=1e-3)
    student, schedule = Student(learning_model(packed, model, learn_groups=True)), Schedule(20, 1e-2, warmup=3)
    assert any(name.endswith("group_steps") for name in student.params)
    step, state = Step(student, model), DistillationState.of(student.params)
    for done in range(schedule.steps):
        state, _ = step(state, IDS, schedule, done)
    learned = student.model(state.params)
    result = packed_again(learned, packed)
    after = result.layers.attention.q_proj.kernel.get_value()
    assert not np.array_equal(kernel.groups.scale, after.groups.scale)
    assert not np.array_equal(kernel.groups.offset, after.groups.offset)
    wanted = forward(learned, IDS)
    np.testing.assert_allclose(forward(result, IDS), wanted, atol=3e-5 * float(np.abs(wanted).max()))


def test_what_learns_are_weights_steps_norms_and_biases_of_blocks_and_the_last_norm(distilled):
    _model, _packed, student, _state, _losses = distilled
    names = set(student.params)
    assert {name.split("/")[0] for name in names} == {"layers", "final_norm"}
    assert {name.rpartition("/")[2] for name in names} == {"rows", "scale", "bias"}
    assert all(is_latent(name) == name.endswith("rows") for name in names)


@pytest.mark.covered("products of 16 bits, by the two tests after it")
def test_operands_of_16_bits_come_near(distilled):
    """Loss and gradient: bfloat16 rounds weights by 0.2% each, of sums of some 24; tokens may be a step apart."""
    model, packed, _student, _state, losses = distilled
    student = Student(learning_model(packed, model, dtype=jnp.bfloat16))
    _, metrics = Step(student, model)(DistillationState.of(student.params), IDS, Schedule(80, 1e-2, warmup=3), 0)
    for name, found in metrics.items():
        assert float(found) == pytest.approx(losses[0][name], rel=0.1)
        assert float(found) != losses[0][name]


def test_products_of_16_bits_have_16_bit_operands_in_their_gradient():
    rng = np.random.default_rng(0)
    x, rows, cotangent = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 8), (5, 8), (6, 5)))
    product, pull_back = jax.vjp(lambda x, rows: float_product(x, rows, jnp.bfloat16), x, rows)
    by_x, by_rows = pull_back(cotangent)
    x, rows, cotangent = (np.asarray(array.astype(jnp.bfloat16), np.float64) for array in (x, rows, cotangent))
    for found, wanted in ((product, x @ rows.T), (by_x, cotangent @ rows), (by_rows, cotangent.T @ x)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_rotation_by_a_matrix_is_that_by_butterflies():
    rotation = hadamard(96, block=48, signs=3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 96)), jnp.float32)
    found, wanted = (jax.jit(rotate)(x) for rotate in (MatrixRotation(rotation, jnp.dtype("float32")), rotation))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_with_16_bits_a_block_hands_16_bits_on_and_rotates_by_a_matrix(distilled):
    model, packed, *_ = distilled
    packed = nnx.clone(packed)
    packed.layers.ffn.rotation = rotation = hadamard(packed.config.ffn_size, block=4)
    wide, narrow = (learning_model(packed, model, dtype=dtype).layers for dtype in (jnp.float32, jnp.bfloat16))
    assert wide.ffn.rotation == rotation
    assert narrow.ffn.rotation == MatrixRotation(rotation, jnp.dtype(jnp.bfloat16))
    assert wide.attention.v_proj.result_dtype is None
    for inner in (narrow.attention.q_proj, narrow.attention.v_proj, narrow.ffn.gate_proj, narrow.ffn.up_proj):
        assert inner.result_dtype == jnp.bfloat16
    for to_stream in (narrow.attention.o_proj, narrow.ffn.down_proj):
        assert to_stream.result_dtype == jnp.float32


def test_numbers_beyond_a_span_have_no_gradient():
    x, rows = jnp.asarray([[-1.0, -0.2, 0.3, 2.0]]), jnp.eye(4)
    for span, wanted in ((1.0, [1, 1, 1, 1]), (0.5, [0, 1, 1, 0])):
        a_format = bj.BipolarFormat(4, span=span)
        found = jax.jit(jax.grad(lambda x, of=a_format: quantized_product(x, rows, of, jnp.float32).sum()))(x)
        np.testing.assert_allclose(found[0], wanted, rtol=1e-6)


def test_the_loss_has_the_gradient_of_the_chain_rule():
    """Logits and their gradient are those of a window at a time; against all windows at once."""
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.standard_normal((2, 7, 5)), jnp.float32)
    output = jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)

    @dataclasses.dataclass
    class Model:
        table: jax.Array

        def hidden_states(self, ids):
            return jnp.tanh(self.table[ids])

        def logits(self, hidden):
            return hidden @ output

    ids, teacher = jnp.asarray(rng.integers(0, 7, (3, 4))), Model(tables[1])

    def at_once(table):
        found, wanted = (model.logits(model.hidden_states(ids)) for model in (Model(table), teacher))
        return bj.nn.distillation_loss(found, wanted)

    found = jax.jit(jax.value_and_grad(lambda table: window_loss(Model(table), teacher, ids)))(tables[0])
    wanted = jax.jit(jax.value_and_grad(at_once))(tables[0])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.covered("the loss of whole windows, by the tests beside")
def test_windows_may_run_in_parts(distilled):
    model, _packed, student, _state, losses = distilled
    schedule = Schedule(steps=30, learning_rate=1e-3, warmup=3)
    _, metrics = Step(student, model, parts=2)(DistillationState.of(student.params), IDS, schedule, 0)
    assert set(metrics) == {"loss", "gradient_norm"}
    assert all(float(metrics[name]) == pytest.approx(losses[0][name], rel=1e-4) for name in metrics)


def test_rates_warm_up_and_fall_to_zero():
    schedule = Schedule(steps=100, learning_rate=2.0, warmup=10)
    rates = np.array([float(schedule.rate(step)) for step in range(100)])
    assert rates[0] == pytest.approx(0.2)
    assert np.argmax(rates) == 9
    assert np.all(np.diff(rates[9:]) < 0)
    assert rates[-1] < 0.001


def test_scales_learn_more_slowly(distilled):
    """Adam's first update is the rate times the sign of the gradient."""
    _model, _packed, _student, _state, losses = distilled
    for name, moved in losses[0]["moved"].items():
        wanted = SCHEDULE.rate(0) * (1 if is_latent(name) else SCHEDULE.scale_rate)
        # Of a number of size 1 float32 takes up to 1e-7 of it.
        np.testing.assert_allclose(moved[moved > 0], wanted, rtol=1e-2, err_msg=name)


@pytest.mark.parametrize(
    ("precision", "steps", "rate"),
    [
        ("W4A8g64", 900, 2e-5),
        ("W4A16g64", 900, 2e-5),
        ("W4A8", 1300, 3e-5),
        ("W3A8g64", 1200, 1e-4),
        ("W2A8g64", 3000, 3e-4),
        ("W1.58A8", 3000, 3e-4),
        ("W1A8g64", 2400, 4e-4),
        ("W4A4g64", 1500, 1e-4),
        ("W1A2g64", 3000, 4e-4),
        ("W8A8", 300, 1e-5),
    ],
)
def test_fewer_bits_learn_longer_and_faster(precision, steps, rate):
    schedule = Schedule.of(bj.Precision.parse(precision))
    assert (schedule.steps, schedule.learning_rate) == (steps, rate)
    assert Schedule.of(bj.Precision.parse(precision), steps=99) == dataclasses.replace(schedule, steps=99)


@pytest.mark.parametrize(
    "options", [{"steps": 50}, {"steps": 60, "learning_rate": 0.0}, {"steps": 60, "scale_rate": -1.0}]
)
def test_impossible_schedules_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        Schedule(**({"learning_rate": 1e-4} | options))


def test_models_that_cannot_learn_are_refused(distilled):
    model, packed, *_ = distilled
    with pytest.raises(ValueError, match="there is nothing to learn"):
        learning_model(model)
    with pytest.raises(ValueError, match="there is nothing to learn"):
        learning_model(packed, learning="none")
    with pytest.raises(ValueError, match="has the shape|float weights have"):
        wide = dataclasses.replace(model.config, ffn_size=28)
        learning_model(packed, random_transformer(wide))
    with pytest.raises(ValueError, match="before prepare_for_inference"):
        learning_model(bj.models.prepare_for_inference(packed))
    trained = bj.quantize_model(bj.quantization_aware(model, [("^layers/", "W4A8")]))
    with pytest.raises(ValueError, match="trained with DotGeneral"):
        learning_model(trained)

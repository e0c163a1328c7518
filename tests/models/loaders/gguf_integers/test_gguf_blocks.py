"""GGUF's integer types are served with the integers and the scales of the file, exactly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.format import TERNARY
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.inference.explain import explain_model
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_gguf, load_pretrained
from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.models.packed_kernels import PackedBuffer, PackedTensor
from bipolar_jax.models.sharding.sharded_transformer import shard_model
from bipolar_jax.nn import with_integer_groups
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.packing import BipolarArray, BlockScaledArray
from bipolar_jax.packing.float_terms import narrowest_terms
from tests.models.loaders.gguf_integers import tiny_blocks as tiny
from tests.support import tiny_checkpoints

ROWS, COLUMNS = 4, 512
# Bits a weight in memory beyond the file's: groups' scales take a byte, ternary weights two bits.
EXTRA_BITS = {"Q3_K": 0.125, "Q4_K": 0.125, "Q5_K": 0.125, "TQ1_0": 0.375}
# Every type once; the inputs of attention's output are 64, which K types do not divide.
FIRST = dict(zip(tiny.NAMES, ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q2_K", "Q3_K", "TQ2_0"), strict=True))
SECOND = dict(zip(tiny.NAMES, ("Q4_0", "Q4_1", "Q5_1", "Q2_0", "TQ1_0", "Q1_0", "Q8_0"), strict=True))
IDS = jnp.array([[5, 300, 17, 42], [1, 2, 3, 4]])


def packed(type_name: str, raw: np.ndarray, columns: int = COLUMNS) -> BlockScaledArray:
    """The array of a whole kernel, filled from two reads."""
    block_type = BLOCK_TYPES[type_name]
    kind = block_type.kind(None)
    tensor = PackedTensor((columns, len(raw)), kind, lambda: None)
    buffer = PackedBuffer((), tensor)
    buffer.fill((), (block_type.numbers(rows, columns) for rows in (raw[:2], raw[2:])))
    return buffer.finish()[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A type, random bytes of it, their array, and what that makes."""

    name: str
    raw: np.ndarray
    array: BlockScaledArray
    numbers: np.ndarray
    floats: BipolarArray
    codes: np.ndarray


@pytest.fixture(scope="module")
def cases():
    """All types, in one program."""
    raw = {name: tiny.random_blocks(name, ROWS, COLUMNS) for name in tiny.LAYOUTS}
    arrays = {name: packed(name, each) for name, each in raw.items()}
    program = jax.jit(lambda arrays: {n: (a.dequantize(), a.with_scales(), a.codes()) for n, a in arrays.items()})
    return {name: Case(name, raw[name], arrays[name], *made) for name, made in program(arrays).items()}


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_weights_are_exactly_those_of_the_formats_reader(name, cases):
    case = cases[name]
    expected = tiny.dequantized(name, case.raw, COLUMNS)
    case.array.check()
    np.testing.assert_array_equal(case.numbers, expected.T)
    case.floats.check()
    scale, offset = (np.repeat(each, case.array.group_size, axis=1) for each in (case.floats.scale, _offsets(case)))
    numbers = scale * (2 * case.codes.astype(np.float32) - case.array.format.max_value) + offset
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=2e-7 * np.abs(expected).max())
    sums = np.asarray(case.codes, np.int32).reshape(ROWS, -1, case.array.group_size).sum(-1)
    np.testing.assert_array_equal(case.floats.row_sums, sums)


def _offsets(case: Case) -> np.ndarray:
    return np.zeros(case.floats.scale.shape) if case.floats.offset is None else np.asarray(case.floats.offset)


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_negative_steps_complement_the_planes(name, cases):
    case = cases[name]
    assert case.floats.scale.min() >= 0
    blocks = case.raw.reshape(-1, tiny.LAYOUTS[name][1])
    fields = BLOCK_TYPES[name].fields(blocks)
    negative = np.repeat(fields.negative(case.array.form), case.array.group_size, axis=1)
    assert negative.any()
    assert not negative.all()
    expected = np.where(negative, case.array.format.max_value - fields.stored, fields.stored)
    np.testing.assert_array_equal(case.codes, expected.reshape(ROWS, COLUMNS))


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_memory_is_the_files(name, cases):
    weights, nbytes, _ = tiny.LAYOUTS[name]
    assert 8 * cases[name].array.nbytes / ROWS / COLUMNS == 8 * nbytes / weights + EXTRA_BITS.get(name, 0)


def test_damaged_ternary_codes_and_scales_are_refused():
    raw = tiny.random_blocks("TQ2_0", 2, 512)
    raw[1, 5] |= 0xC0
    with pytest.raises(ValueError, match="codes above 2"):
        packed("TQ2_0", raw)
    raw = tiny.random_blocks("Q4_K", 4, 512)
    raw[3, 0:2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="1 of its 4 numbers of scale are not finite"):
        packed("Q4_K", raw)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("blocks") / "model.gguf", [FIRST, SECOND], "Q6_K")


@pytest.fixture(scope="module")
def loaded(path):
    return load_pretrained(path, activations=8)


@pytest.fixture(scope="module")
def floats(path):
    """The model of the dequantized weights."""
    return load_gguf(path).model


def host_numbers(array: BlockScaledArray) -> np.ndarray:
    """The numbers [n, k] by NumPy, without a program."""
    planes, steps = np.asarray(array.planes), np.asarray(array.block_scale).astype(np.float32)
    form, groups = array.form, array.contracted_size // array.group_size
    bits = np.unpackbits(planes.view(np.uint8), axis=-1, bitorder="little")[..., : array.contracted_size]
    codes = np.tensordot(array.format.plane_weights, bits, (0, 0))
    steps = np.repeat(steps, form.block_size // array.group_size, axis=1)
    minimums = np.zeros_like(steps)
    if form.minimum:
        minimums = np.repeat(
            np.asarray(array.block_minimum).astype(np.float32), groups // array.block_minimum.shape[1], 1
        )
    integers = None if array.group_scales is None else np.asarray(array.group_scales)
    if form.group_scales == "nibbles":
        steps, minimums = steps * (integers & 15), minimums * (integers >> 4)
    elif integers is not None:
        steps = steps * integers
        minimums = minimums * (0 if array.group_minimums is None else np.asarray(array.group_minimums))
    steps, minimums = (np.repeat(each.astype(np.float32), array.group_size, axis=1) for each in (steps, minimums))
    stored = np.where(steps < 0, array.format.max_value - codes, codes)
    return steps * (form.factor * stored - form.zero).astype(np.float32) + minimums


def test_every_matrix_of_a_file_has_its_own_integers(loaded, floats):
    """Every type in one file, in the order of our rows, beside the file dequantized."""
    ours = loaded.model
    for layer, types in enumerate((FIRST, SECOND)):
        for name, type_name in types.items():
            where = f"attention/{name[5:]}_proj" if "attn" in name else f"ffn/{name[4:]}_proj"
            where = where.replace("output", "o")
            stack = layer_at(ours.layers[str(layer)], where).kernel.get_value()  # of one layer
            array = jax.tree.map(lambda leaf: np.asarray(leaf)[0], stack)
            expected = np.asarray(layer_at(floats.layers, where).kernel)[layer]
            assert array.form == BLOCK_TYPES[type_name].form
            np.testing.assert_array_equal(host_numbers(array), expected.T, err_msg=type_name)
    assert ours.layers["1"].ffn.up_proj.precision.a_bits == 8
    assert ours.lm_head.precision.a_bits is ours.embed.precision.a_bits is None
    np.testing.assert_array_equal(host_numbers(ours.lm_head.kernel.get_value()), floats.lm_head.kernel[...].T)
    np.testing.assert_array_equal(host_numbers(ours.embed.embedding.get_value()), floats.embed.embedding[...])


def logits_of(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda model: model(IDS))(model))


def error_of(model, expected: np.ndarray) -> float:
    """Largest difference of logits, relative to the largest one."""
    return float(np.abs(logits_of(model) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A file with two packed matrices and a tied table."""
    types = {"attn_output": "Q5_0", "ffn_down": "Q4_K"}
    return tiny.write(tmp_path_factory.mktemp("some") / "some.gguf", [types], "Q5_1", tied=True)


@pytest.fixture(scope="module")
def expected(some):
    """Logits of the dequantized weights."""
    return logits_of(load_gguf(some).model)


def test_tied_tables_stay_one(some):
    ours = load_gguf(some, activations=16).model
    assert ours.config.tie_embeddings
    assert not hasattr(ours, "lm_head")
    assert "float dot of integer values" in str(explain_model(ours, 1, 4))


def test_logits_of_all_types(path, floats):
    """With float activations, those of the dequantized weights."""
    assert error_of(load_gguf(path, activations=16).model, logits_of(floats)) < 1e-5


@pytest.mark.covered("test_logits_of_all_types; and the products of float groups")
def test_prepared_logits_of_all_types(path, floats):
    with pytest.warns(UserWarning, match="layers stay apart"):
        prepared = prepare_for_inference(load_gguf(path, activations=16).model)
    assert error_of(prepared, logits_of(floats)) < 1e-5


def test_integer_activations_are_those_of_the_layers(some, expected):
    ours = prepare_for_inference(load_gguf(some, activations=8).model)
    assert 1e-5 < error_of(ours, expected) < 0.05


def test_saved_models_have_float_scales(some, tmp_path):
    loaded = load_gguf(some, activations=8)
    save_model(tmp_path / "packed.safetensors", loaded)
    again = load_model(tmp_path / "packed.safetensors").model
    for module in ("ffn/down_proj", "attention/o_proj"):
        ours, other = (layer_at(each.block(0), module) for each in (loaded.model, again))
        assert ours.precision == other.precision
        before, after = ours.kernel.get_value(), other.kernel.get_value()
        assert isinstance(after, BipolarArray)
        np.testing.assert_array_equal(before.planes, after.planes)
        np.testing.assert_array_equal(before.scale, after.scale)


def test_precisions_say_whether_there_are_offsets(cases):
    """As packed files read them."""
    for name, case in cases.items():
        assert (case.floats.offset is not None) == (BLOCK_TYPES[name].kind(8).precision.calibration == "minmax"), name


@pytest.mark.covered("test_saved_models_have_float_scales, by the same scales; and the products of float groups")
@pytest.mark.parametrize("activations", [8, 16])
def test_models_are_cut_over_devices(some, activations):
    model = load_gguf(some, activations=activations).model
    sharded = shard_model(model, jax.make_mesh((2,), ("model",)))
    assert sharded.plan.attention
    assert sharded.plan.ffn
    assert error_of(sharded, logits_of(prepare_for_inference(model))) < 1e-5


@pytest.mark.covered("tests/nn/test_with_integer_groups.py, on arrays with float scales")
def test_groups_become_integers_by_choice(some):
    ours = load_gguf(some, activations=8).model
    converted, report = with_integer_groups(ours)
    before, after = (each.block(0).ffn.down_proj.kernel.get_value() for each in (ours, converted))
    assert after.has_integer_groups
    np.testing.assert_array_equal(before.planes, after.planes)
    assert any(layer.errors and max(layer.errors) > 0 for layer in report.layers)


def test_projections_of_one_type_are_joined(tmp_path):
    path = tiny.write(tmp_path / "joined.gguf", [dict.fromkeys(("attn_q", "attn_k", "attn_v"), "Q4_1")] * 2)
    ours = load_gguf(path, activations=8).model
    joined = prepare_for_inference(ours, layout="planes").layers.attention.qkv_proj.kernel.get_value()
    assert isinstance(joined, BlockScaledArray)
    assert joined.shape == (2, 256, 128)
    parts = [getattr(ours.layers.attention, f"{name}_proj").kernel.get_value().block_minimum for name in "qkv"]
    np.testing.assert_array_equal(joined.block_minimum, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("activations", [0, 9, True, "8"])
def test_other_activations_are_refused(activations, path):
    with pytest.raises(ValueError, match="activations must be 1 to 8 bits, or 16"):
        load_gguf(path, activations=activations)


def test_files_of_floats_take_no_activations(tmp_path):
    path = tiny_checkpoints.write_gguf(tiny_checkpoints.make(), tmp_path / "f16.gguf", "F16")
    with pytest.raises(ValueError, match="f16.gguf: it has no integers, so it takes no activations=8"):
        load_pretrained(path, activations=8)


def test_ternary_types_are_ternary():
    assert {name for name, each in BLOCK_TYPES.items() if each.bits is TERNARY} == {"TQ1_0", "TQ2_0"}


def test_programs_with_packed_weights_are_exported(cases):
    """`jax.export` stores the form of the scales beside the other static attributes."""
    array = cases["Q2_K"].array
    lookup = jax.jit(lambda array: array.block_scale.sum(dtype=jnp.float32))
    blob = jax.export.export(lookup)(array).serialize()
    assert jax.export.deserialize(blob).call(array) == lookup(array)
    assert "blocks of 256" in repr(array)
    assert repr(jax.tree.map(lambda leaf: None, array)) == "BlockScaledArray(2, group_size=16, blocks of 256)"


@pytest.mark.parametrize(("name", "terms"), [("Q4_0", "zeros"), ("Q4_1", "minimums"), ("Q4_K", "offsets")])
def test_tensor_cores_get_the_smallest_exact_terms(name, terms):
    """4 bytes a group for the scales of the simple types, which keep their float16; minimums if steps are positive."""
    raw = tiny.random_blocks(name, ROWS, COLUMNS, size=0.05)
    raw.reshape(-1, tiny.LAYOUTS[name][1])[:, 1] &= 0x7F  # the sign of the first half
    array = packed(name, raw)
    assert narrowest_terms(array.scale, array.offset, array.format) == terms


def test_arrays_that_do_not_fit_their_form_are_refused(cases):
    array = cases["Q4_K"].array
    with pytest.raises(ValueError, match="inconsistent BlockScaledArray"):
        dataclasses.replace(array, block_scale=array.block_scale[:, :1]).check()
    with pytest.raises(ValueError, match="inconsistent BlockScaledArray"):
        dataclasses.replace(array, group_minimums=None).check()

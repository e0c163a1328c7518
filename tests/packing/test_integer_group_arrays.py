"""`BipolarArray` with integer groups: decoding, sums, truncation, sizes, trees, errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarArray, BipolarFormat, from_codes
from bipolar_jax.quantize.integer_groups import IntegerGroups
from tests.support.integer_products import packed_in_integer_groups, random_codes

FORMATS = [*(BipolarFormat(bits) for bits in (1, 3, 6)), TERNARY]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def weights(n: int, k: int, group_size: int, seed: int = 0) -> BipolarArray:
    """[k, n] of 4 bits."""
    fmt = BipolarFormat(4)
    return packed_in_integer_groups(random_codes(fmt, n, k, seed), fmt, group_size, seed)


@every_format
@pytest.mark.parametrize(("k", "group_size"), [(70, 16), (100, 33)])
def test_values_sums_and_numbers_follow_the_definition(fmt, k, group_size):
    """Ragged last groups; the row sum is over the true k, although padding bytes have the value o."""
    codes = random_codes(fmt, 5, k, seed=k)
    w = packed_in_integer_groups(codes, fmt, group_size, seed=1)
    scale, offset = (
        np.repeat(np.asarray(a, int), group_size, axis=1)[:, :k] for a in (w.groups.scale, w.groups.offset)
    )
    values = scale * codes + offset
    assert (w.T.values().dtype, w.row_sums.dtype) == (jnp.int32, jnp.int32)
    np.testing.assert_array_equal(w.codes(), codes)
    np.testing.assert_array_equal(w.T.values(), values)
    np.testing.assert_array_equal(w.T.signed_rows(), values.astype(np.int8))
    np.testing.assert_array_equal(w.row_sums, values.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(w.value_sums(), w.row_sums)
    np.testing.assert_array_equal(w.T.dequantize(), np.asarray(w.scale) * values.astype(np.float32))
    assert w.num_groups == -(-k // group_size)
    assert w.scale.shape == w.row_sums.shape == (5, 1)
    w.check()


@pytest.mark.parametrize("fewer", [1, 2, 3])
def test_truncation_keeps_the_high_planes_and_moves_numbers_by_half_a_scale_at_most(fewer):
    w = weights(4, 100, 32).T
    short = w.truncate(fewer)
    short.check()
    codes = np.asarray(w.codes()) >> (4 - fewer)
    np.testing.assert_array_equal(short.codes(), codes)
    np.testing.assert_array_equal(short.row_sums, np.asarray(short.values()).sum(-1, keepdims=True))
    floats = from_codes(w.codes(), 4, -1, *w.groups.float_grid(w.scale, w.format), group_size=32)
    moved = np.abs(np.asarray(short.dequantize()) - np.asarray(floats.truncate(fewer).dequantize()))
    assert (moved <= np.asarray(w.scale) * 0.5001).all()
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda w: w.truncate(fewer))(w), short)


@pytest.mark.parametrize(("group_size", "most"), [(128, 4.2), (64, 4.35), (32, 4.6)])
def test_bits_of_memory_for_each_weight(group_size, most):
    w = weights(8, 1024, group_size)
    assert 8 * w.nbytes / (1024 * 8) <= most


def test_arrays_stack_slice_and_join():
    single = [weights(5, 96, 32, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    stack.check()
    assert stack.shape == (3, 96, 5)
    np.testing.assert_array_equal(stack.dequantize(), [w.dequantize() for w in single])
    np.testing.assert_array_equal(jax.tree.map(lambda leaf: leaf[1], stack).dequantize(), single[1].dequantize())
    np.testing.assert_array_equal(jax.vmap(lambda w: w.dequantize())(stack), stack.dequantize())
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-2), *single)
    joined.check()
    np.testing.assert_array_equal(joined.dequantize(), np.concatenate([w.dequantize() for w in single], axis=1))


def test_unpacking_keeps_the_numbers_and_the_codes():
    w = weights(5, 100, 16)
    unpacked = w.unpack()
    unpacked.check()
    np.testing.assert_array_equal(unpacked.codes(), w.codes())
    np.testing.assert_array_equal(unpacked.values(), w.values())
    np.testing.assert_array_equal(unpacked.dequantize(), w.dequantize())


def test_repr_says_integer_groups():
    text = repr(weights(5, 96, 32))
    assert text == "BipolarArray(shape=(96, 5), bits=4, group_size=32, integer groups)"


@pytest.mark.wrong_arrays
def test_check_names_the_leaf_that_does_not_fit():
    w = weights(5, 96, 32)
    groups = w.groups
    wrong = {
        "groups.scale": {"groups": dataclasses.replace(groups, scale=groups.scale[:, :2])},
        "groups.offset": {"groups": dataclasses.replace(groups, offset=groups.offset[:2])},
        "got scale": {"scale": jnp.ones((5, 3))},
        "uint8 and offsets in int8, got int32 and int8": {
            "groups": dataclasses.replace(groups, scale=groups.scale.astype(jnp.int32))
        },
        "no float offsets": {"offset": jnp.ones((5, 1))},
        "give a group_size": {"group_size": None},
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **fields).check()


@pytest.mark.wrong_arrays
@pytest.mark.parametrize(
    ("scale", "offset", "message"),
    [
        (np.zeros((3, 2), np.uint8), np.zeros((3, 2), np.int8), "scales from 0"),
        (np.full((3, 2), 17, np.uint8), np.zeros((3, 2), np.int8), r"values up to 255: .*scale \* 15 \+ offset"),
        (np.ones((3, 1), np.uint8), np.zeros((3, 2), np.int8), r"scales of shape \(3, 1\)"),
        (np.ones((3, 2), np.int32), np.zeros((3, 2), np.int8), "uint8"),
    ],
)
def test_from_codes_checks_integer_groups(scale, offset, message):
    codes = random_codes(BipolarFormat(4), 3, 64, seed=0)
    with pytest.raises(ValueError, match=message):
        from_codes(codes, 4, -1, np.ones((3, 1)), group_size=32, groups=IntegerGroups(scale, offset))

"""`UnpackedArray`: the statements of its docstring, and that it represents what the packed array does."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from bipolar_jax import TERNARY, quantize
from bipolar_jax.quantize.groups import join_groups
from tests.support.integer_products import normal


def packed(bits=4, axis=-2, group_size=None):
    x = normal(2, 40, 40)[..., :12] if axis == -2 else normal(2, 12, 40)
    return quantize(x, bits, axis, group_size, scales="float")


@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (TERNARY, 16), (8, 16), (1, 7)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_codes_and_numbers_are_those_of_the_packed_array(bits, group_size, axis):
    w = packed(bits, axis, group_size)
    unpacked = w.unpack()
    unpacked.check()
    assert unpacked.signed_codes.dtype == np.int8
    signed = np.asarray(w.codes(), int) - w.format.code_offset
    rows = np.asarray(join_groups(np.moveaxis(np.asarray(unpacked.signed_codes), -3, -2), 40))
    np.testing.assert_array_equal(rows, signed)
    for name in ("codes", "values", "dequantize"):
        np.testing.assert_array_equal(getattr(unpacked, name)(), getattr(w, name)())
    for name in ("shape", "ndim", "bits", "num_groups"):
        assert getattr(unpacked, name) == getattr(w, name)
    assert unpacked.T.shape == w.T.shape
    assert unpacked.scale is not None


def test_a_short_group_is_padded_with_zeros():
    signed = np.asarray(packed(8, group_size=16).unpack().signed_codes)
    assert signed.shape == (2, 3, 12, 16)
    assert not signed[:, 2, :, 8:].any()
    assert signed[:, 2, :, :8].any()


def test_it_is_a_pytree_with_batch_axes():
    w = packed(4, group_size=16)
    first = jax.tree.map(lambda leaf: leaf[0], w.unpack())
    first.check()
    expected = jax.tree.map(lambda leaf: leaf[0], w).dequantize()
    np.testing.assert_array_equal(first.dequantize(), expected)
    mapped = jax.vmap(lambda array: array.dequantize())(w.unpack())
    np.testing.assert_array_equal(mapped, w.dequantize())


def test_repr_and_size():
    unpacked = packed(4, group_size=16).unpack()
    assert repr(unpacked).startswith("UnpackedArray(shape=(2, 40, 12), bits=4, group_size=16")
    assert unpacked.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(unpacked))
    assert "UnpackedArray(P, P" in repr(jax.tree.map(lambda _: "P", unpacked))


@pytest.mark.wrong_arrays
def test_leaves_that_do_not_fit_are_refused():
    unpacked = packed(4).unpack()
    for changes in ({"signed_codes": unpacked.signed_codes[..., :8]}, {"row_sums": unpacked.row_sums[:, :3]}):
        with pytest.raises(ValueError, match="inconsistent UnpackedArray"):
            dataclasses.replace(unpacked, **changes).check()

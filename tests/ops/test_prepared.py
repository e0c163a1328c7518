"""Operations give the same numbers with weights that are laid out for Hopper's kernels; what needs planes refuses."""

from __future__ import annotations

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.nn.layers.joined import joined
from bipolar_jax.ops import Activation, lookup
from tests.support.integer_products import normal

X = normal(4, 72)
GATED = Activation("silu", gated=True)
COLUMNS = bj.quantize(normal(72, 20, seed=1), 5, axis=0, calibration="minmax")
GROUPS = bj.quantize(normal(72, 20, seed=1), 4, axis=0, group_size=32, scales="integer")
FLOATS = bj.quantize(normal(72, 20, seed=1), 4, axis=0, group_size=32, scales="float", calibration="minmax")
STACK = jax.tree.map(lambda *leaves: jnp.stack(leaves), GROUPS, dataclasses.replace(GROUPS, scale=2 * GROUPS.scale))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.sample(2)
def test_products_have_the_same_bits(implementation, gated):
    options = {"activation": GATED if gated else None, "bias": jnp.ones(20), "implementation": implementation}
    for w in (COLUMNS, GROUPS, FLOATS):
        expected = bj.matmul(X, w, 8, **options)
        np.testing.assert_array_equal(bj.matmul(X, w.prepare(gated=gated), 8, **options), expected)


def test_stacks_and_float_activations_give_the_same_bits():
    x = jnp.stack([X, X + 1])
    for a_bits in (8, None):
        np.testing.assert_array_equal(bj.matmul(x, STACK.prepare(), a_bits), bj.matmul(x, STACK, a_bits))


def test_gradients_are_the_same():
    def loss(x, scale, w):
        return bj.matmul(x, dataclasses.replace(w, scale=scale), 8).sum()

    expected, found = (jax.grad(loss, (0, 1))(X, GROUPS.scale, w) for w in (GROUPS, GROUPS.prepare()))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gradients_of_float_groups():
    """Their scale is one of the column, below which the groups' are."""
    prepared = FLOATS.prepare()

    def loss(x, scale):
        return (bj.matmul(x, dataclasses.replace(prepared, scale=scale * prepared.scale), 8) ** 2).sum()

    def expected_loss(x, scale):
        w = dataclasses.replace(FLOATS, scale=scale * FLOATS.scale, offset=scale * FLOATS.offset)
        return (bj.matmul(x, w, 8) ** 2).sum()

    found, expected = (jax.grad(each, (0, 1))(X, jnp.ones((20, 1))) for each in (loss, expected_loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), found, expected)


@pytest.mark.parametrize("w", [COLUMNS, GROUPS, FLOATS], ids=["columns", "groups", "floats"])
def test_programs_with_prepared_arguments_are_exported(w):
    prepared = w.prepare(gated=True)
    exported = jax.export.export(jax.jit(lambda x, w: bj.matmul(x, w, 8)))(X, prepared)
    data = exported.serialize()
    field = b', "for_floats": false'
    assert field in data
    for each in (data, data.replace(field, b" " * len(field))):  # which programs that were exported earlier lack
        loaded = jax.export.deserialize(each)
        np.testing.assert_array_equal(loaded.call(X, prepared), bj.matmul(X, w, 8))


def test_shapes_alone_are_explained_and_printed():
    prepared = jax.eval_shape(lambda: GROUPS.prepare(gated=True))
    assert repr(prepared) == "PreparedArray(shape=(72, 20), bits=4, group_size=32, integer groups, gated)"
    for_floats = jax.eval_shape(lambda: COLUMNS.prepare(for_floats=True))
    assert repr(for_floats) == "PreparedArray(shape=(72, 20), bits=5, group_size=None, with offset, for floats)"
    assert "undoes the layout of Hopper kernels" in str(bj.explain(X, prepared, 8))


def test_what_needs_planes_or_rows_refuses(tmp_path):
    prepared = GROUPS.prepare()
    with pytest.raises(ValueError, match="a PreparedArray has no planes to drop: truncate the BipolarArray"):
        prepared.truncate(2)
    with pytest.raises(ValueError, match="has no rows to look up: look them up in the array that it is made of"):
        lookup(FLOATS.prepare().T, jnp.asarray([0]))
    with pytest.raises(ValueError, match="w is laid out for inference: save the model as it was before"):
        bj.save(tmp_path / "w.safetensors", {"w": prepared})
    layer = bj.nn.Linear(72, 20, precision="W4A8g32", use_bias=False, kernel=prepared)
    with pytest.raises(ValueError, match="laid out for a GPU are not joined"):
        joined([layer, layer])


def test_rows_of_a_prepared_table_are_looked_up():
    ids = jnp.asarray([[19, 3], [0, 20]])
    found = lookup(GROUPS.T.prepare(), ids, jnp.bfloat16)
    np.testing.assert_array_equal(found, lookup(GROUPS.T, ids, jnp.bfloat16))
    assert np.isnan(found[1, 1]).all()
    for table in (GROUPS.T, bj.quantize(normal(20, 72), 2, axis=-1)):
        assert lookup(table.prepare(), ids[:0]).shape == lookup(table, ids[:0]).shape == (0, 2, 72)


def test_columns_of_tiles_come_back_in_order():
    """Gates and values of two tiles, the second one ragged."""
    w = bj.quantize(normal(40, 150, seed=2), 8, axis=0, calibration="minmax")
    prepared = w.prepare(gated=True)
    in_tiles = prepared.in_order_of_tiles()
    in_tiles.check()
    assert in_tiles.shape == (40, 256)
    np.testing.assert_array_equal(prepared.columns_in_order(in_tiles.dequantize()), w.dequantize())

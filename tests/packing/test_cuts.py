"""Which cuts of packed arrays are whole words and groups, and what each device then has."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import bipolar_jax as bj
from bipolar_jax.packing.cuts import cut_unit, own_part, partition_specs, shard, shardings, taken_columns, taken_rows
from tests.support.integer_products import normal

K, N = 192, 4
MESH = jax.make_mesh((2,), ("model",))
WIDE = AbstractMesh((2, 4), ("data", "model"))
KINDS = {
    "column": {"bits": 4},
    "integer groups": {"bits": 4, "group_size": 96},
    "float groups": {"bits": 4, "group_size": 48, "scales": "float"},
    "one group": {"bits": 2, "group_size": K, "scales": "float"},
}


def packed(kind, axis=0):
    kernel = normal(K, N)
    return bj.quantize(kernel if axis == 0 else kernel.T, axis=axis, **KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "unit"), [("column", 32), ("integer groups", 96), ("float groups", 96), ("one group", 32)]
)
def test_k_is_cut_at_ends_of_words_and_groups(kind, unit):
    w = packed(kind)
    assert cut_unit(w) == unit
    found = jax.tree.map(np.asarray, shard(w, MESH, P("model")))
    assert jax.tree.structure(found) == jax.tree.structure(w)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(w)))


def test_specs_follow_what_each_leaf_holds():
    specs = partition_specs(packed("integer groups"), P("k", "n"))
    assert (specs.planes, specs.scale, specs.row_sums) == (P(None, "n", "k"), P("n", None), P("n", None))
    assert (specs.groups.scale, specs.groups.offset, specs.offset) == (P("n", "k"), P("n", "k"), None)
    specs = partition_specs(packed("float groups"), P(None, "n"))
    assert (specs.planes, specs.scale, specs.offset) == (P(None, "n", None), P("n", None), P("n", None))
    specs = partition_specs(packed("float groups"), P("k"))
    assert (specs.scale, specs.offset, specs.row_sums) == (P(None, "k"),) * 3
    assert partition_specs(packed("float groups").unpack(), P("k")).signed_codes == P("k", None, None)
    assert partition_specs(packed("column").unpack(), P("k", "n")).signed_codes == P(None, "n", "k")


def test_tables_and_stacks_have_specs_in_the_order_of_their_shape():
    assert partition_specs(packed("column", axis=1), P("n", "k")).planes == P(None, "n", "k")
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), packed("column"))
    specs = partition_specs(stack, P("layer", "k", "n"))
    assert (specs.planes, specs.scale) == (P("layer", None, "n", "k"), P("layer", "n", None))


def test_logical_names_become_mesh_axes():
    rules = {"mlp": "model", "embed": ("data", "fsdp")}
    assert partition_specs(packed("column"), P("embed", "mlp"), rules).planes == P(None, "model", ("data", "fsdp"))
    assert partition_specs(packed("column"), P("heads", "mlp"), rules).planes == P(None, "model", None)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_arrays_in_their_own_right(kind):
    w = packed(kind)
    halves = [
        own_part(jax.tree.map(lambda leaf, i=i: leaf.addressable_shards[i].data, shard(w, MESH, P("model"))), 2)
        for i in range(2)
    ]
    numbers = np.concatenate([half.dequantize() for half in halves])
    np.testing.assert_array_equal(numbers, w.dequantize())
    if halves[0].row_sums.shape == w.row_sums.shape:
        np.testing.assert_array_equal(sum(np.asarray(half.row_sums) for half in halves), w.row_sums)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (
            "column",
            P(("data", "model")),
            "k=192 of .* cannot be cut into 8 parts of a multiple of 32 elements .words of",
        ),
        ("integer groups", P("model"), "4 parts of a multiple of 96 elements .words of 32, groups of 96.: cut it over"),
        ("column", P(None, ("data", "model")), "axis -1 of shape .192, 4. has 4 elements, which 8 devices"),
        ("column", P("pipe"), "the mesh has the axes data, model, not 'pipe'"),
        ("column", P("model", "model"), "uses a mesh axis twice"),
        ("column", P("data", "model", None), "has 3 axes"),
    ],
)
def test_other_cuts_are_refused_with_the_numbers(kind, spec, message):
    with pytest.raises(ValueError, match=message):
        shardings(packed(kind), WIDE, spec)


@pytest.mark.parametrize(
    ("kind", "start", "count"), [("column", 80, 58), ("integer groups", 96, 48), ("float groups", 144, 24)]
)
def test_ranges_of_rows_are_padded_with_what_adds_nothing(kind, start, count):
    """Rows that begin and end within words and groups; sums and numbers are those of the range alone."""
    w, size = packed(kind), 120 if kind == "column" else 144
    group_size = {"column": None, "integer groups": 48, "float groups": 24}[kind]
    take = jax.jit(lambda w, start, count: taken_rows(w, start, count, size, group_size))
    part = take(w, np.int32(start), np.int32(count))
    assert (part.shape, part.group_size) == ((size, N), group_size)
    np.testing.assert_array_equal(part.codes()[:, :count], w.codes()[:, start : start + count])
    values = np.asarray(part.values()).T
    if kind == "float groups":
        assert not np.asarray(part.dequantize())[count:].any()
    else:
        np.testing.assert_array_equal(part.value_sums()[:, 0], values[:, :count].sum(axis=1))
        np.testing.assert_array_equal(values[:, count:].sum(axis=1), 0)
    np.testing.assert_array_equal(np.asarray(part.dequantize())[:count], w.dequantize()[start : start + count])


@pytest.mark.parametrize("kind", ["integer groups", "float groups"])
def test_ranges_of_columns_are_padded_with_zeros(kind):
    w = packed(kind)
    part = jax.jit(lambda w, start, count: taken_columns(w, start, count, 3))(w, np.int32(2), np.int32(2))
    found = np.asarray(part.dequantize())
    np.testing.assert_array_equal(found[:, :2], w.dequantize()[:, 2:])
    assert found.shape == (K, 3)
    assert not found[:, 2].any()
    np.testing.assert_array_equal(part.value_sums()[:2], w.value_sums()[2:])


def test_groups_that_no_range_ends_in_are_refused():
    with pytest.raises(ValueError, match="has groups of 96: groups of 36 do not divide them"):
        jax.eval_shape(lambda w: taken_rows(w, np.int32(0), np.int32(72), 72, 36), packed("integer groups"))


def test_only_packed_arrays_and_specs_are_taken():
    with pytest.raises(ValueError, match="only packed arrays have parts to cut, got ndarray"):
        partition_specs(np.ones(3), P("model"))
    with pytest.raises(ValueError, match="the spec must be a .*PartitionSpec, got None"):
        partition_specs(packed("column"), None)


def test_prepared_arrays_are_cut_before():
    with pytest.raises(ValueError, match="cut the BipolarArray that it is made of, and prepare the parts"):
        partition_specs(packed("column").prepare(), P("model"))

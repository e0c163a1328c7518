"""`save` and `load` restore every array bit for bit; a save that fails leaves the old file unchanged."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bipolar_jax import TERNARY, BipolarArray, BipolarFormat, from_codes, load, quantize, save
from bipolar_jax.checkpoint import read_user
from bipolar_jax.checkpoint.checksums import checksum, plane_checksums
from tests.support.integer_products import normal, packed_in_integer_groups, random_codes


def assert_same(one, other):
    """Same structure, static fields, dtypes and bytes."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("fmt", [*(BipolarFormat(bits) for bits in range(1, 9)), TERNARY], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("shape", "axis", "group_size", "calibration"),
    [((40, 6), -2, None, "absmax"), ((6, 33), -1, 8, "minmax"), ((2, 3, 40, 6), -2, 16, "mse")],
)
@pytest.mark.sample(2)
def test_packed_arrays_come_back_bit_for_bit(tmp_path, fmt, shape, axis, group_size, calibration):
    w = quantize(normal(*shape), fmt, axis, group_size, calibration, scales="float")
    save(tmp_path / "w", {"w": w})
    assert_same(load(tmp_path / "w"), {"w": w})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_plain_arrays_come_back_bit_for_bit(tmp_path, dtype, shape):
    array = jnp.asarray(normal(*shape) * 10).astype(dtype)
    save(tmp_path / "a", {"a": array})
    assert_same(load(tmp_path / "a"), {"a": array})


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_arrays_of_64_bits_are_kept_or_refused(tmp_path, dtype):
    """By default JAX narrows to 32 bits: 2^40 would be loaded as 0 and 1 + 2^-40 as 1."""
    array = np.array([2**40 + 1], "int64") if dtype == "int64" else np.array([1 + 2.0**-40])
    try:
        save(tmp_path / "a", {"a": array})
        loaded = load(tmp_path / "a")["a"]
    except ValueError:
        return
    assert np.asarray(loaded).tolist() == array.tolist()


def test_numpy_arrays_of_any_memory_layout_come_back(tmp_path):
    tree = {"fortran": np.asfortranarray(normal(3, 5)), "strided": normal(6, 4)[::2, ::-1]}
    save(tmp_path / "a", tree)
    assert_same(load(tmp_path / "a"), jax.tree.map(jnp.array, tree))


def test_nested_trees_come_back_as_nested_dicts(tmp_path):
    w = quantize(normal(40, 6), 4, 0)
    save(tmp_path / "t", {"a": {"b": [jnp.ones(2), {"c": w}]}, "d": jnp.zeros(())})
    assert_same(load(tmp_path / "t"), {"a": {"b": {"0": jnp.ones(2), "1": {"c": w}}}, "d": jnp.zeros(())})


def test_a_single_array_comes_back_as_itself(tmp_path):
    for leaf in (quantize(normal(40, 6), 4, 0), jnp.arange(3)):
        save(tmp_path / "leaf", leaf)
        assert_same(load(tmp_path / "leaf"), leaf)


def test_an_empty_tree_comes_back(tmp_path):
    save(tmp_path / "e", {})
    assert load(tmp_path / "e") == {}


def test_user_object_comes_back(tmp_path):
    user = {"model": "tiny", "layers": [1, 2], "π": None}
    save(tmp_path / "u", {"a": jnp.ones(1)}, user=user)
    assert read_user(tmp_path / "u") == user


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("text", "user must be a dict with texts as keys, .*got 'text'"),
        ({"layers": [{3: "W4A8"}]}, "user must be a dict with texts as keys"),
        ({"a": {1, 2}}, "user cannot be written as JSON: .*set"),
    ],
)
def test_a_user_object_that_would_not_come_back_is_refused(tmp_path, user, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "u", {"a": jnp.ones(1)}, user=user)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fewer", [1, 3, 4, 8])
@pytest.mark.parametrize("shape", [(40, 6), (2, 40, 6)])
def test_loading_fewer_bits_is_truncating(tmp_path, fewer, shape):
    tree = {
        "eight": quantize(normal(*shape), 8, -2, 16, "minmax"),
        "two": quantize(normal(*shape), 2, -2),
        "ternary": quantize(normal(*shape), TERNARY, -2),
        "float": jnp.ones(3),
    }
    save(tmp_path / "w", tree)
    expected = tree | {name: tree[name].truncate(min(fewer, tree[name].bits)) for name in ("eight", "two")}
    assert_same(load(tmp_path / "w", bits=fewer), expected)


@pytest.mark.parametrize("bits", [0, 9, 2.5, True])
def test_loading_impossible_bits_raises(tmp_path, bits):
    save(tmp_path / "w", {})
    with pytest.raises(ValueError, match=f"got {bits}"):
        load(tmp_path / "w", bits=bits)


def header_of(raw: bytes) -> tuple[dict, int]:
    """The safetensors header, and the offset of the data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def test_loading_fewer_bits_reads_only_the_top_planes(tmp_path):
    """With the low planes overwritten, the high planes still load; reading more planes raises."""
    w = quantize(normal(64, 6), 4, 0)
    save(tmp_path / "w", {"w": w})
    raw = bytearray((tmp_path / "w").read_bytes())
    header, data = header_of(raw)
    begin, end = header["w.planes"]["data_offsets"]
    middle = data + (begin + end) // 2
    raw[data + begin : middle] = bytes(255 - b for b in raw[data + begin : middle])
    (tmp_path / "w").write_bytes(raw)
    assert_same(load(tmp_path / "w", bits=2), {"w": w.truncate(2)})
    for bits in (3, 4, None):
        with pytest.raises(ValueError, match=r"w\.planes does not match its checksum"):
            load(tmp_path / "w", bits=bits)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": 3.0}, "a is a float, not an array"),
        ({"a": {"b": "text"}}, "a/b is a str"),
        ("text", "the tree is a str"),
        ({"key": jax.random.key(0)}, "key has dtype key<fry>.*or store its jax.random.key_data"),
        ({"a/b": jnp.ones(1)}, r"'a/b'.*'/'.*rename"),
    ],
)
def test_errors_of_save_name_the_leaf_or_the_key(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "x", tree)
    assert os.listdir(tmp_path) == []


def test_keys_that_look_like_fields_are_refused_or_kept_apart(tmp_path):
    """The packed array `a` is written as a.planes and so on; here another array is named a.planes."""
    w = quantize(normal(40, 6), 4, 0)
    tree = {"a": w, "a.planes": jnp.ones(3)}
    try:
        save(tmp_path / "x", tree)
    except ValueError:
        return
    assert_same(load(tmp_path / "x"), tree)


def test_empty_keys_are_refused_or_kept(tmp_path):
    tree = {"": jnp.ones(2), "b": jnp.zeros(1)}
    try:
        save(tmp_path / "x", tree)
    except ValueError:
        return
    assert_same(load(tmp_path / "x"), tree)


@pytest.mark.wrong_arrays
def test_an_inconsistent_array_is_not_written(tmp_path):
    w = quantize(normal(40, 6), 4, 0)
    with pytest.raises(ValueError, match="inconsistent"):
        save(tmp_path / "x", {"w": dataclasses.replace(w, scale=w.scale[:3])})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["replace", "fsync", "save_file"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    save(tmp_path / "x", {"a": jnp.ones(3)})

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy if failing == "save_file" else os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "x", {"a": jnp.zeros(3)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"]
    assert_same(load(tmp_path / "x"), {"a": jnp.ones(3)})


def test_a_tree_that_is_refused_leaves_the_old_file_and_nothing_else(tmp_path):
    save(tmp_path / "x", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="b is a str"):
        save(tmp_path / "x", {"a": jnp.zeros(3), "b": "text"})
    assert os.listdir(tmp_path) == ["x"]
    assert_same(load(tmp_path / "x"), {"a": jnp.ones(3)})


def test_saving_replaces_and_makes_directories(tmp_path):
    path = tmp_path / "new" / "deep" / "x"
    for fill in (0.0, 1.0):
        save(str(path), {"a": jnp.full(3, fill)})
    assert_same(load(str(path)), {"a": jnp.ones(3)})
    assert os.listdir(path.parent) == ["x"]


def bits_a_weight(path, w: BipolarArray) -> float:
    """Of the tensors alone; the header is below 2 KB."""
    save(path, {"w": w})
    raw = path.read_bytes()
    _, data = header_of(raw)
    assert data < 2048
    return 8 * (len(raw) - data) / math.prod(w.shape)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_weight_takes_n_bits_on_disk(tmp_path, bits):
    """In groups of 128: the planes, and 4 bytes per group for the float scale."""
    w = quantize(normal(1024, 64), bits, 0, 128, "absmax", scales="float")
    assert bits_a_weight(tmp_path / "w", w) == bits + 32 / 128


@pytest.mark.parametrize(("group_size", "integer", "half"), [(128, 4.2, 4.25), (64, 4.35, 4.5)])
def test_scales_of_groups_take_two_bytes_on_disk(tmp_path, group_size, integer, half):
    """Integer groups; and float16 scales with whole zero points, as GPTQ's and AWQ's checkpoints have them."""
    fmt, rng = BipolarFormat(4), np.random.default_rng(0)
    w = packed_in_integer_groups(random_codes(fmt, 8, 1024, seed=0), fmt, group_size, seed=0)
    assert bits_a_weight(tmp_path / "w", w) <= integer
    assert_same(load(tmp_path / "w"), {"w": w})
    scale = rng.uniform(0.01, 0.1, (8, 1024 // group_size)).astype(np.float16).astype(np.float32)
    zero = rng.integers(0, 16, scale.shape).astype(np.float32)
    w = from_codes(rng.integers(0, 16, (8, 1024)), 4, -1, scale / 2, scale * (7.5 - zero), group_size)
    assert bits_a_weight(tmp_path / "w", w) <= half
    assert_same(load(tmp_path / "w"), {"w": w})


@pytest.mark.parametrize("group_size", [16, 64])
def test_integer_groups_come_back_and_truncate(tmp_path, group_size):
    fmt = BipolarFormat(4)
    single = packed_in_integer_groups(random_codes(fmt, 5, 100, seed=0), fmt, group_size, seed=0)
    w = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), single)
    save(tmp_path / "w", {"w": w})
    assert_same(load(tmp_path / "w"), {"w": w})
    assert_same(load(tmp_path / "w", bits=2), {"w": w.truncate(2)})


@pytest.mark.parametrize("group_size", [None, 16])
def test_files_of_version_1_load_with_the_same_numbers(tmp_path, group_size):
    """As version 1 wrote them: float32 scales and offsets, and the sums of all groups."""
    w = quantize(normal(40, 6), 4, 0, group_size, "minmax", scales="float")
    tensors = {f"w.{field}": np.asarray(getattr(w, field)) for field in ("planes", "scale", "offset", "row_sums")}
    checksums = {name: checksum(array) for name, array in tensors.items()}
    checksums["w.planes"] = plane_checksums(tensors["w.planes"])
    packed = {"bits": 4, "ternary": False, "contracted_size": 40, "axis": -2, "group_size": group_size}
    text = json.dumps({"format_version": 1, "packed": {"w": packed}, "checksums": checksums, "user": {}})
    metadata = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
    safetensors.numpy.save_file(tensors, tmp_path / "w", metadata=metadata)
    assert_same(load(tmp_path / "w"), {"w": w})
    assert_same(load(tmp_path / "w", bits=3), {"w": w.truncate(3)})


def test_an_array_named_like_a_field_is_refused(tmp_path):
    w = quantize(np.ones((4, 4), np.float32), 4, -2)
    with pytest.raises(ValueError, match=r"\['w.offset'\] are tensor names of fields of packed arrays"):
        save(tmp_path / "x.safetensors", {"w": w, "w.offset": np.ones((4, 1), np.float32)})


def test_every_layer_plane_and_1024_rows_have_a_checksum_of_their_own(tmp_path):
    """A slice is verified by what is read of it."""
    w = from_codes(np.random.default_rng(0).integers(0, 4, (2, 1100, 32)), 2, -1, np.ones((2, 1100, 1)))
    save(tmp_path / "w", {"w": w})
    header, _ = header_of((tmp_path / "w").read_bytes())
    found = json.loads(header["__metadata__"]["bipolar_jax"][8:])["checksums"]["w.planes"]
    planes = np.asarray(w.planes)
    rows = (slice(0, 1024), slice(1024, 1100))
    assert found == [[[checksum(planes[layer, plane, r]) for r in rows] for plane in (0, 1)] for layer in (0, 1)]

"""`load` raises ValueError for damage anywhere in a file, and for files that `save` did not write."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar_jax import TERNARY, from_codes, load, quantize, save
from bipolar_jax.checkpoint import read_user
from bipolar_jax.checkpoint.checksums import block_checksums, checksum
from tests.support.imports import ROOT
from tests.support.integer_products import normal


def header_of(raw: bytes) -> tuple[dict, int]:
    """The safetensors header, and the offset of the data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[bytes, object]:
    path = tmp_path_factory.mktemp("intact") / "file"
    grouped = quantize(normal(4, 9), 3, -1, 4, "minmax", scales="float")
    tree = {"w": quantize(normal(33, 3), TERNARY, 0), "q": grouped, "b": jnp.ones(3)}
    save(path, tree, user={"name": "tiny"})
    return path.read_bytes(), path.parent / "damaged"


def assert_refused(path, raw: bytes):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        load(path)


def test_the_intact_file_loads(intact):
    raw, path = intact
    path.write_bytes(raw)
    assert set(load(path)) == {"w", "q", "b"}


def flipped(raw: bytes, bit: int) -> bytes:
    damaged = bytearray(raw)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_flipped_bit_anywhere_is_refused(intact):
    """About 600 bits, evenly spread over length, header, padding and data."""
    raw, path = intact
    for bit in [*range(64), *range(64, 8 * len(raw), max(1, 8 * len(raw) // 540))]:
        assert_refused(path, flipped(raw, bit))


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_at_any_offset_is_refused(intact, data):
    raw, path = intact
    assert_refused(path, flipped(raw, data.draw(st.integers(0, 8 * len(raw) - 1))))


def test_truncation_at_any_length_is_refused(intact):
    raw, path = intact
    lengths = {0, 1, 7, 8, 9, header_of(raw)[1], len(raw) - 1, *range(0, len(raw), 61)}
    for length in sorted(lengths):
        assert_refused(path, raw[:length])


def test_bytes_after_the_end_are_refused(intact):
    raw, path = intact
    assert_refused(path, raw + b"\0")


def with_body(raw: bytes, change) -> bytes:
    """The file with changed metadata and the checksum of the changed metadata."""
    header, data = header_of(raw)
    body = json.loads(header["__metadata__"]["bipolar_jax"][8:])  # after its checksum
    change(body)
    text = json.dumps(body)
    header["__metadata__"] = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
    return with_header(raw, header, data)


def with_header(raw: bytes, header: dict, data: int) -> bytes:
    """The file with another header."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + raw[data:]


def test_another_format_version_is_refused_by_number(intact):
    raw, path = intact
    path.write_bytes(with_body(raw, lambda body: body.update(format_version=99)))
    with pytest.raises(ValueError, match=r"format version 99, this bipolar_jax reads 1 to 2: .*, which is newer"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["packed"]["w"].update(contracted_size=65),
        lambda body: body["packed"]["w"].update(bits=9),
        lambda body: body["packed"]["w"].pop("axis"),
        lambda body: body["packed"]["w"].update(axis=7),
        lambda body: body["packed"]["w"].update(axis={}),
        lambda body: body["packed"]["w"].update(axis=True),
        lambda body: body["packed"]["q"].update(group_size=0),
        lambda body: body["packed"]["q"].update(group_size=3.0),
        lambda body: body["packed"]["q"].update(group_size=10**30),
        lambda body: body["packed"]["w"].update(contracted_size=10**400),
        lambda body: body["packed"]["w"].update(ternary="no"),
        lambda body: body["packed"].update(w=[]),
        lambda body: body["checksums"].update({"w.planes": 5}),
        lambda body: body["checksums"].pop("b"),
        lambda body: body.pop("packed"),
        lambda body: body.update(user=None),
        lambda body: body.update(format_version="1"),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(intact, change):
    raw, path = intact
    path.write_bytes(with_body(raw, change))
    with pytest.raises(ValueError, match=r"damaged is (truncated or )?corrupted"):
        load(path)


@pytest.mark.parametrize("text", ["no JSON", "[1]", "[" * 100_000, "9" * 5000])
def test_a_body_of_another_form_under_a_right_checksum_is_refused(intact, text):
    raw, path = intact
    header, data = header_of(raw)
    header["__metadata__"] = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
    path.write_bytes(with_header(raw, header, data))
    with pytest.raises(ValueError, match="damaged is truncated or corrupted"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["w.planes"].update(shape=[2]),
        lambda header: header["w.planes"].update(shape=[]),
        lambda header: header["w.planes"].update(dtype="I32"),
        lambda header: header["w.scale"].update(dtype="U32"),
        lambda header: header["w.scale"].update(shape=[-3, -1]),
        lambda header: header["w.scale"].update(shape=[2**62, 2**62]),
        lambda header: header["w.scale"].update(shape=[True, 3]),
        lambda header: header["w.scale"].update(data_offsets=[0]),
        lambda header: header.update({"w.scale": 5}),
        lambda header: header["__metadata__"].update(other=5),
    ],
)
def test_a_changed_header_is_refused(intact, change):
    raw, path = intact
    header, data = header_of(raw)
    change(header)
    path.write_bytes(with_header(raw, header, data))
    with pytest.raises(ValueError, match="damaged is (truncated or )?corrupted"):
        load(path)


@pytest.mark.parametrize("field", ["scale", "offset"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(tmp_path, field, value):
    codes = np.random.default_rng(0).integers(0, 8, (4, 9))
    w = from_codes(codes, 3, -1, normal(4, 3), normal(4, 3, seed=1), group_size=4)
    bad = dataclasses.replace(w, **{field: getattr(w, field).at[0, 0].set(value)})
    with pytest.raises(ValueError, match="not finite"):
        save(tmp_path / "x", {"w": bad})
    save(tmp_path / "x", {"w": w})
    raw = (tmp_path / "x").read_bytes()
    header, data = header_of(raw)
    start = data + header[f"w.{field}"]["data_offsets"][0]
    raw = raw[:start] + np.float32(value).tobytes() + raw[start + 4 :]
    changed = np.asarray(getattr(bad, field))
    (tmp_path / "x").write_bytes(
        with_body(raw, lambda body: body["checksums"].update({f"w.{field}": checksum(changed)}))
    )
    with pytest.raises(ValueError, match=r"/x is truncated or corrupted \(w has scales or offsets that are not finite"):
        load(tmp_path / "x")


def write(path, arrays: dict, **body) -> None:
    """A file with right checksums of any arrays."""
    checksums = {name: checksum(array) for name, array in arrays.items()}
    checksums |= {name: block_checksums(array) for name, array in arrays.items() if name.endswith(".planes")}
    text = json.dumps({"format_version": 2, "packed": {}, "user": {}, "checksums": checksums} | body)
    metadata = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
    safetensors.numpy.save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups.scale": np.full((4, 1), 255, np.uint8)}, r"values up to 3825: .*scale \* 15"),
        ({"groups.scale": np.zeros((4, 1), np.uint8)}, "scales from 0"),
        ({"groups.scale": np.ones((4, 2), np.uint8)}, r"groups\.scale has shape \(4, 2\), expected \(4, 1\)"),
        ({"groups.offset": np.zeros((4, 1), np.int16)}, "int16, expected int8"),
        ({"groups.offset": None}, r"w\.groups\.offset"),
        ({"offset": np.zeros((4, 1), np.float32)}, "integer groups and float offsets"),
        ({"row_sums": None}, r"w\.row_sums"),
        ({"scale": np.ones((4, 1), np.int8)}, "int8, expected float32"),
    ],
)
def test_fields_of_integer_groups_that_do_not_fit_are_refused(tmp_path, changes, message):
    fields = {
        "planes": np.zeros((4, 4, 1), np.uint32),
        "scale": np.ones((4, 1), np.float32),
        "row_sums": np.zeros((4, 1), np.int32),
        "groups.scale": np.ones((4, 1), np.uint8),
        "groups.offset": np.zeros((4, 1), np.int8),
    }
    arrays = {f"w.{name}": array for name, array in (fields | changes).items() if array is not None}
    packed = {"w": {"bits": 4, "ternary": False, "contracted_size": 32, "axis": -1, "group_size": 32}}
    write(tmp_path / "x", arrays, packed=packed)
    with pytest.raises(ValueError, match=f"/x is truncated or corrupted .*{message}"):
        load(tmp_path / "x")


def test_an_array_inside_another_is_refused(tmp_path):
    write(tmp_path / "x", {"a": np.ones(3, np.float32), "a/b": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="'a/b' lies inside another one"):
        load(tmp_path / "x")


def test_a_file_without_read_permission_is_not_called_damaged(intact, monkeypatch):
    raw, path = intact
    path.write_bytes(raw)

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)  # root may read any file
    with pytest.raises(PermissionError, match="damaged"):
        load(path)


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    code = (
        "import resource, signal, numpy as np, bipolar_jax as bj\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try:\n    bj.save({str(tmp_path / 'x')!r}, dict(a=np.ones(1000, np.float32)))\n"
        "except OSError as error:\n    print(type(error).__name__, error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("OSError cannot write ")
    assert str(tmp_path / "x") in printed
    assert os.listdir(tmp_path) == []


def test_other_files_are_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is not a packed checkpoint"):
        load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"no packed checkpoint at .*missing"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no packed checkpoint"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_user(tmp_path / "missing")

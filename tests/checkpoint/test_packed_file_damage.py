"""`load` raises ValueError for damage anywhere in a file, and for files that `save` did not write."""

from __future__ import annotations

import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar_jax import TERNARY, load, quantize, save
from bipolar_jax.checkpoint import read_user
from tests.support.random_arrays import normal


def header_of(raw: bytes) -> tuple[dict, int]:
    """The safetensors header, and the offset of the data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[bytes, object]:
    path = tmp_path_factory.mktemp("intact") / "file"
    tree = {"w": quantize(normal(33, 3), TERNARY, 0), "q": quantize(normal(4, 9), 3, -1, 4, "minmax"), "b": jnp.ones(3)}
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
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + raw[data:]


def test_another_format_version_is_refused_by_number(intact):
    raw, path = intact
    path.write_bytes(with_body(raw, lambda body: body.update(format_version=99)))
    with pytest.raises(ValueError, match=r"format version 99, this bipolar_jax reads 1: write it again"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["packed"]["w"].update(contracted_size=65),
        lambda body: body["packed"]["w"].update(bits=9),
        lambda body: body["packed"]["w"].pop("axis"),
        lambda body: body["checksums"].pop("b"),
        lambda body: body.pop("packed"),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(intact, change):
    raw, path = intact
    path.write_bytes(with_body(raw, change))
    with pytest.raises(ValueError, match=r"damaged is (truncated or )?corrupted|inconsistent BipolarArray|got 9"):
        load(path)


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

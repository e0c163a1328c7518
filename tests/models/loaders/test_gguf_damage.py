"""Damaged GGUF files raise one ValueError without delay."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar_jax.models.loaders import load_gguf
from bipolar_jax.models.loaders.gguf.header import check_gguf
from tests.support import tiny_checkpoints as tiny

# Guards against hanging: damage is found while the header is read.
SECONDS = 5.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return tiny.write_gguf(tiny.make(), tmp_path_factory.mktemp("gguf") / "model.gguf", "Q8_0").read_bytes()


@pytest.fixture(scope="module")
def header_size(whole) -> int:
    """Approximate end of the last tensor's description, in bytes."""
    return whole.index(b"output.weight") + 64


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("damage") / "model.gguf"


def refusal(path, data: bytes) -> str:
    """The message of the ValueError that loading these bytes raises."""
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_gguf(path)
    assert time.monotonic() - start < SECONDS
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def patched(data: bytes, position: int, layout: str, value: int) -> bytes:
    return data[:position] + struct.pack(layout, value) + data[position + struct.calcsize(layout) :]


def after(data: bytes, key: str) -> int:
    """The position after a key or a tensor's name."""
    return data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)


def test_truncated_in_the_header(whole, header_size, scratch):
    for size in [*range(0, 64), *range(64, header_size, 61)]:
        message = refusal(scratch, whole[:size])
        assert "download it again" in message
        assert size < 4 or f"{size:,} bytes" in message or "bytes follow" in message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_at_random(whole, scratch, data):
    size = data.draw(st.integers(0, len(whole) - 1))
    assert "download it again" in refusal(scratch, whole[:size])


def test_truncated_weights_name_the_tensor_and_the_sizes(whole, scratch):
    cut = len(whole) - 1000
    message = refusal(scratch, whole[:cut])
    assert f"the file has {cut:,} bytes" in message
    assert "tensor 'blk.2." in message


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bits_in_the_header_are_found_or_harmless(whole, header_size, scratch, data):
    """`check_gguf` raises only ValueError, and never hangs."""
    flipped = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        flipped[data.draw(st.integers(0, header_size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(flipped)
    start = time.monotonic()
    try:
        check_gguf(scratch)
    except ValueError as error:
        assert str(scratch) in str(error)
    assert time.monotonic() - start < SECONDS


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flipped_bits_load_or_raise_one_value_error(whole, header_size, scratch, data):
    """Damage that `check_gguf` does not find is found by the config, the tokenizer or the shapes."""
    flipped = bytearray(whole)
    # Most of the header is the vocabulary, so half of the flips are in the keys before it.
    own_keys = st.integers(0, whole.index(b"tokenizer.ggml.tokens"))
    flipped[data.draw(own_keys | st.integers(0, header_size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(flipped)
    try:
        load_gguf(scratch)
    except ValueError as error:
        assert str(scratch) in str(error)


HUGE = (2**20, 2**40, 2**63, 2**64 - 1)


@pytest.mark.parametrize("count", HUGE)
def test_huge_array_lengths(whole, scratch, count):
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"):
        # After the key: uint32 "array", uint32 type of the items, uint64 count.
        message = refusal(scratch, patched(whole, after(whole, key) + 8, "<Q", count))
        assert f"{count:,}" in message
        assert key in message


@pytest.mark.parametrize("count", HUGE)
def test_huge_counts_and_lengths(whole, scratch, count):
    assert f"{count:,} tensors" in refusal(scratch, patched(whole, 8, "<Q", count))
    assert f"{count:,} metadata keys" in refusal(scratch, patched(whole, 16, "<Q", count))
    assert f"{count:,} bytes of metadata key" in refusal(scratch, patched(whole, 24, "<Q", count))
    position = after(whole, "general.architecture") + 4
    assert f"{count:,} bytes of general.architecture" in refusal(scratch, patched(whole, position, "<Q", count))


def test_other_files(whole, scratch):
    assert "is empty" in refusal(scratch, b"")
    assert "not a GGUF file: it starts with b'PK" in refusal(scratch, b"PK\x03\x04" + bytes(100))
    assert "version 1, supported are" in refusal(scratch, patched(whole, 4, "<I", 1))
    assert f"version {3 << 24}" in refusal(scratch, patched(whole, 4, ">I", 3))


def test_damaged_tensor_descriptions(whole, scratch):
    # After the name: uint32 rank, two uint64 dimensions, uint32 type, uint64 offset.
    at = after(whole, "blk.1.ffn_up.weight")
    assert "has 0 dimensions" in refusal(scratch, patched(whole, at, "<I", 0))
    assert "dimensions, allowed are 1 to 4" in refusal(scratch, patched(whole, at, "<I", 2**31))
    assert "has shape (96, 65), impossible" in refusal(scratch, patched(whole, at + 4, "<Q", 65))
    assert "has shape (96, 0), impossible" in refusal(scratch, patched(whole, at + 4, "<Q", 0))
    assert "is at offset" in refusal(scratch, patched(whole, at + 4, "<Q", 2**63))
    assert "type MXFP4 (39), whose weights are floats of four bits" in refusal(
        scratch, patched(whole, at + 20, "<I", 39)
    )
    assert "type IQ2_XXS (16), whose weights are entries of codebooks, no integer grid, supported are F32" in refusal(
        scratch, patched(whole, at + 20, "<I", 16)
    )
    assert "type 9999, supported are F32" in refusal(scratch, patched(whole, at + 20, "<I", 9999))
    assert "is at offset 64, expected" in refusal(scratch, patched(whole, at + 24, "<Q", 64))


def test_duplicates(whole, scratch):
    twice = whole.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    assert "tensor 'blk.0.ffn_up.weight' occurs twice" in refusal(scratch, twice)
    twice = whole.replace(b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.eos_token_id")
    assert "metadata key 'tokenizer.ggml.eos_token_id' occurs twice" in refusal(scratch, twice)


def test_text_that_is_not_utf8(whole, scratch):
    assert "metadata key at byte" in refusal(scratch, whole.replace(b"llama.block_count", b"llama.block_coun\xff"))


@pytest.mark.parametrize("alignment", [0, 3, 48])
def test_alignment_must_be_a_power_of_two(tmp_path, alignment):
    path = tiny.write_gguf(tiny.make(metadata={"general.alignment": alignment}), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=f"general.alignment is {alignment}, expected a power of two"):
        check_gguf(path)


def test_unknown_value_types(whole, scratch):
    at = after(whole, "llama.block_count")
    assert "unknown value type 77" in refusal(scratch, patched(whole, at, "<I", 77))
    at = after(whole, "tokenizer.ggml.merges") + 4
    assert "array of unknown value type 9" in refusal(scratch, patched(whole, at, "<I", 9))

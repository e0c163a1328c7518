"""Reading a model needs the memory of its weights, and a bounded number of bytes for each byte of metadata."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from tests.support import tiny_checkpoints as tiny
from tests.support.peak_memory import peak_bytes

ALLOWED = 64 << 20
PREPARE = """
import jax, gguf, gguf.quants, tokenizers
from bipolar_jax.models.loaders import load_gguf, load_huggingface
def attempt(load, path):
    try:
        return load(path)
    except ValueError as error:
        return error
"""
BYTES = 4_000_000


def strings(item: str, count: int) -> bytes:
    encoded = item.encode()
    return (struct.pack("<Q", len(encoded)) + encoded) * count


def with_array(raw: bytes, key: str, kind: int, count: int, content: bytes) -> bytes:
    """The GGUF file with another array as its first key."""
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IIQ", 9, kind, count) + content
    (keys,) = struct.unpack("<Q", raw[16:24])
    aligned = entry + struct.pack("<Q", 3) + b"pad" + struct.pack("<I", 8)
    padding = -(len(aligned) + 8) % 32  # so that the tensors stay where they are
    aligned += struct.pack("<Q", padding) + b"x" * padding
    return raw[:16] + struct.pack("<Q", keys + 2) + aligned + raw[24:]


@pytest.mark.parametrize(
    ("key", "kind", "count", "content"),
    [
        ("unused", 0, BYTES, bytes(BYTES)),
        ("unused", 8, BYTES // 8, strings("", BYTES // 8)),
        ("unused", 12, BYTES // 8, bytes(BYTES)),
        ("tokenizer.ggml.scores", 6, BYTES // 4, bytes(BYTES)),
        ("tokenizer.ggml.scores", 8, BYTES // 12, strings("abcd", BYTES // 12)),
    ],
    ids=["bytes", "empty strings", "doubles", "scores", "scores as texts"],
)
@pytest.mark.sample(1)
def test_gguf_arrays(tmp_path, key, kind, count, content):
    raw = tiny.write_gguf(tiny.make(), tmp_path / "model.gguf").read_bytes()
    raw = with_array(raw, key, kind, count, content)
    (tmp_path / "model.gguf").write_bytes(raw)
    peak = peak_bytes(PREPARE, f"attempt(load_gguf, {str(tmp_path / 'model.gguf')!r})")
    assert peak < ALLOWED + 32 * len(raw)


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_weights_are_in_memory_once(tmp_path, kind):
    """64 MB of float32 in one tensor, from 4 or 2 bytes a weight."""
    checkpoint = tiny.make(tied=True)
    name = "model.embed_tokens.weight"
    rows = 262_144
    table = np.zeros((rows, tiny.HIDDEN), np.float32)
    checkpoint = dataclasses.replace(
        checkpoint, weights=checkpoint.weights | {name: table}, metadata={"llama.vocab_size": rows}
    )
    if kind == "gguf":
        path = tiny.write_gguf(checkpoint, tmp_path / "model.gguf")
    else:
        path = tiny.write_huggingface(checkpoint, tmp_path, dtype="bfloat16")
    load = f"attempt(load_{kind}, {str(path)!r})"
    small = tiny.write_huggingface(tiny.make(), tmp_path / "small")
    peak = peak_bytes(f"{PREPARE}\nload_huggingface({str(small)!r})", f"(lambda m: m.model.config)({load})")
    assert table.nbytes < peak < table.nbytes + (24 << 20)


def test_packed_weights_are_in_memory_once(tmp_path):
    """33 MB of 8-bit weights in one tensor, which are read in chunks of half a million."""
    rows, width = 491_520, tiny.HIDDEN
    checkpoint = tiny.make(tied=True)
    table = np.zeros((rows, width), np.float32)
    checkpoint = dataclasses.replace(
        checkpoint,
        weights=checkpoint.weights | {"model.embed_tokens.weight": table},
        metadata={"llama.vocab_size": rows},
    )
    path = tiny.write_gguf(checkpoint, tmp_path / "model.gguf", "Q8_0")
    small = tiny.write_gguf(tiny.make(), tmp_path / "small.gguf", "Q8_0")
    prepare = f"{PREPARE}\nload_gguf({str(small)!r}, activations=8)"
    peak = peak_bytes(prepare, f"(lambda m: m.model.config)(load_gguf({str(path)!r}, activations=8))")
    packed = table.size * 34 // 32
    assert packed < peak < packed + (24 << 20)


NESTED = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("config.json", "[],"),
        ("config.json", '{"":0},'),
        ("config.json", NESTED + ","),
        ("generation_config.json", "1.5,"),
        ("tokenizer.json", '{"a":[]},'),
        ("tokenizer.json", '["ab","cd"],'),
        ("model.safetensors.index.json", "{},"),
    ],
)
@pytest.mark.sample(1)
def test_json_files(tmp_path, name, item):
    directory = tiny.write_huggingface(tiny.make(), tmp_path / "hf", shards=2)
    path = directory / name
    fields = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps(fields)[:-1] + (", " if fields else "") + '"x": [' + item * (BYTES // len(item)) + "0]}"
    path.write_text(text)
    peak = peak_bytes(PREPARE, f"attempt(load_huggingface, {str(directory)!r})")
    assert peak < ALLOWED + 32 * len(text)


def test_a_header_of_many_tensors(tmp_path):
    directory = tiny.write_huggingface(tiny.make(), tmp_path / "hf")
    arrays = {f"t{index}": np.zeros(0, np.float32) for index in range(BYTES // 55)}
    safetensors.numpy.save_file(arrays, directory / "model.safetensors")
    peak = peak_bytes(PREPARE, f"attempt(load_huggingface, {str(directory)!r})")
    assert peak < ALLOWED + 32 * (directory / "model.safetensors").stat().st_size

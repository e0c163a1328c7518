"""Damages files: bytes at random, and values of JSON and of GGUF headers where a reader would meet them."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any

# Values that readers of sizes, names and numbers get wrong.
VALUES = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**30, 10**400, 1e-308, 1e308, 1.5,
    float("nan"), float("inf"), "", "x", "a" * 5000, "\ud800", "\x00", "..", "F32", "yarn", "llama", [], {}, [1], ["a"],
    {"a": 1}, [[[]]], [10**400], [None],
)  # fmt: skip
TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
# Regular expressions that backtrack, need much memory, or are none.
EXPRESSIONS = (
    r"(.+)+x", r"(\w+\s?)*;", "(a|aa)+$", "(?:a?){1000}x", "((((a{10}){1000}){1000}){1000}){1000}", "(", "[", "",
    "a{9999999}", r"\p{L}+|\s+", "(" * 5000, "(?=(.*))" * 50, r"(a\g<1>?b)", "\x00",
)  # fmt: skip
INTEGERS = (0, 1, 2, 3, 7, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four changes, most of them in the first tenth, where the headers are."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(data) // rng.choice((1, 10)))) if data else 0
        length = rng.choice((1, 4, 8, 64, 1000))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            layout = rng.choice("IQ")
            data[at : at + struct.calcsize(layout)] = struct.pack(
                f"<{layout}", rng.choice(INTEGERS) % (1 << 8 * struct.calcsize(layout))
            )
    return bytes(data)


def damaged_json(value: Any, rng: random.Random) -> str:
    """The text of the value after one to three changes; sometimes of a text that is no JSON."""
    for _ in range(rng.randint(1, 3)):
        value = _changed(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.05:
        depth = rng.choice((500, 100_000))
        text = text.replace("1", "[" * depth + "]" * depth, 1)
    if rng.random() < 0.1:
        text = damaged_bytes(text.encode(), rng).decode(errors="replace")
    return text


def damaged_field(value: dict[str, Any], names: Sequence[str], rng: random.Random) -> str:
    """As `damaged_json`, of one of these fields, so that the damage is seldom in the largest ones."""
    name = rng.choice(names)
    return _with_text(value, name, damaged_json(value[name], rng))


def _with_text(value: dict[str, Any], name: str, text: str) -> str:
    """JSON with a text, which need not be JSON, as the value of a field."""
    marker = "the damaged field"
    return json.dumps(value | {name: marker}).replace(json.dumps(marker), text, 1)


def _changed(value: Any, rng: random.Random) -> Any:
    """A copy with one node, at any depth, replaced, removed, doubled or renamed; it shares all other nodes."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    value = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    kind = rng.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[rng.choice(("x", "", "type", "a" * 300, "\x00"))] = value.pop(key)
    elif kind == 2 and isinstance(value, list):
        value.append(value[key])
    elif kind == 3 and isinstance(value, dict):
        value[key] = value[rng.choice(keys)]
    else:
        value[key] = _changed(value[key], rng)
    return value


def damaged_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """A file with a damaged header of the right length, or with damaged bytes."""
    if rng.random() < 0.3:
        return damaged_bytes(raw, rng)
    (length,) = struct.unpack("<Q", raw[:8])
    header = damaged_json(json.loads(raw[8 : 8 + length]), rng).encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def damaged_packed(raw: bytes, rng: random.Random) -> bytes:
    """A packed file with damaged metadata under the right checksum, or damaged as any safetensors file."""
    if rng.random() < 0.4:
        return damaged_safetensors(raw, rng)
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = _damaged_body(json.loads(header["__metadata__"]["bipolar_jax"][8:]), rng)
    text = text.encode("utf-8", "replace").decode()
    header["__metadata__"]["bipolar_jax"] = f"{zlib.crc32(text.encode()):08x}{text}"
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :]


def _damaged_body(body: dict[str, Any], rng: random.Random) -> str:
    """The text of a packed file's metadata after damage in one of its parts."""
    part = rng.choice(("all", "packed", "user", "tokenizer"))
    if part in ("all", "packed"):
        return damaged_json(body, rng) if part == "all" else damaged_field(body, ("packed",), rng)
    user = body["user"]
    if part == "tokenizer":
        text = damaged_field(json.loads(user["tokenizer"]), TOKENIZER_PARTS, rng)
        return json.dumps(body | {"user": user | {"tokenizer": text}})
    return _with_text(body, "user", damaged_field(user, (*("config", "precisions") * 2, "param_dtype"), rng))


_GGUF_NAMES = (
    b"attn_q.weight", b"output.weight", b"token_embd.weight", b"general.architecture", b"add_bos", b"token_id",
    b".block_count", b"head_count", b"key_length", b"freq_base", b".tokens", b"token_type", b"merges", b".scores",
    b"ggml.pre", b"ggml.model", b"unknown_token_id", b"chat_template", b"attn_norm.weight", b"context_length",
)  # fmt: skip


def damaged_gguf(raw: bytes, rng: random.Random, names: Sequence[bytes] = _GGUF_NAMES) -> bytes:
    """A file with damaged bytes, or with one number after one of the names, of keys and of tensors, replaced."""
    if rng.random() < 0.5:
        return damaged_bytes(raw, rng)
    name = rng.choice(names)
    found = raw.find(name)
    if found < 0:
        return damaged_bytes(raw, rng)
    at = found + len(name) + rng.choice((0, 4, 8, 12, 16, 20, 24))
    layout = rng.choice("IQ")
    size = struct.calcsize(layout)
    return raw[:at] + struct.pack(f"<{layout}", rng.choice(INTEGERS) % (1 << 8 * size)) + raw[at + size :]


def damaged_gguf_integers(raw: bytes, rng: random.Random) -> bytes:
    """As `damaged_gguf`; or a matrix of a layer says that it has another type, or its weights are damaged."""
    kind = rng.randrange(3)
    if kind == 0:
        return damaged_gguf(raw, rng)
    if kind == 1:
        data = bytearray(raw)
        at = rng.randrange(len(raw) // 2, len(raw))
        length = min(rng.choice((1, 2, 300)), len(raw) - at)
        data[at : at + length] = rng.randbytes(length)
        return bytes(data)
    matrix = rng.choice((b"attn_q", b"attn_k", b"attn_v", b"attn_output", b"ffn_gate", b"ffn_up", b"ffn_down"))
    name = b"blk.%d.%s.weight" % (rng.randrange(2), matrix)
    at = raw.find(name) + len(name) + 4 + 16  # rank, two dimensions
    return raw[:at] + struct.pack("<I", rng.randrange(48)) + raw[at + 4 :]

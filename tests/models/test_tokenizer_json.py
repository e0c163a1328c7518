"""tokenizer.json: settings of a single call are off, and damage is one ValueError that names the file."""

from __future__ import annotations

import json
import re

import pytest

from bipolar_jax.models.tokenizer_json import load_tokenizer
from tests.support import tiny_checkpoints as tiny

TEXT = "the quick brown fox jumps over the lazy dog, and it's not the first time"
PADDING = {
    "strategy": {"Fixed": 2**31 - 1},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<|end|>",
}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture(scope="module")
def fields() -> dict:
    return json.loads(tiny.make_tokenizer("smollm").to_str())


def written(path, fields):
    (path / "tokenizer.json").write_text(json.dumps(fields))
    return path / "tokenizer.json"


@pytest.mark.parametrize("settings", [{}, {"truncation": TRUNCATION}, {"padding": PADDING}])
def test_texts_are_encoded_whole(tmp_path, fields, settings):
    tokenizer = load_tokenizer(written(tmp_path, fields | settings))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert tokenizer.encode(TEXT).ids == tiny.make_tokenizer("smollm").encode(TEXT).ids


def added(fields: dict, content: str, special: bool = True) -> tuple[dict, int]:
    token = fields["added_tokens"][-1]
    new = token | {"id": token["id"] + 1, "content": content, "special": special}
    return fields | {"added_tokens": [*fields["added_tokens"], new]}, new["id"]


def test_a_padding_token_past_the_vocabulary_is_left_out(tmp_path, fields):
    padded, token = added(fields, "<pad>")
    tokenizer = load_tokenizer(written(tmp_path, padded), vocab_size=token)
    assert tokenizer.token_to_id("<pad>") is None
    assert max(tokenizer.encode("a <pad> b").ids) < token
    assert load_tokenizer(written(tmp_path, padded), vocab_size=token + 1).token_to_id("<pad>") == token


@pytest.mark.parametrize(("content", "special"), [("<|im_start|>", True), ("<pad>", False)])
def test_other_tokens_past_the_vocabulary_are_refused(tmp_path, fields, content, special):
    changed, token = added(fields, content, special)
    with pytest.raises(
        ValueError, match=f"tokenizer.json has token id {token}, but config.json has vocab_size={token}"
    ):
        load_tokenizer(written(tmp_path, changed), vocab_size=token)


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": split("(a+)+$")},
        {"pre_tokenizer": split("(\\s+)+$")},
        {"pre_tokenizer": split("(")},
        {"pre_tokenizer": {"type": "NewKind"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
        {"model": None},
        {"added_tokens": [{"id": -1, "content": "a"}]},
        {"version": "9.9"},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_damage_is_one_value_error(tmp_path, fields, change):
    path = written(tmp_path, fields | change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged: .*; download it again$") as caught:
        load_tokenizer(path, 1000)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff\xfe", b"{", b'{"a": ' + b"[" * 100_000, b"9" * 5000])
def test_other_files_are_one_value_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(ValueError, match="tokenizer.json is damaged: .*download it again"):
        load_tokenizer(tmp_path / "tokenizer.json")

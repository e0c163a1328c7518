"""Expressions and replacements of a tokenizer.json that would take for ever, or all memory, are refused soon."""

from __future__ import annotations

import json
import time

import pytest
import tokenizers

from bipolar_jax.models.loaders.gguf.tokenizer import _DEFAULT_PATTERNS
from bipolar_jax.models.tokenizer_json import encode, encode_texts, load_tokenizer
from bipolar_jax.models.tokenizer_limits import check_limits
from tests.support import tiny_checkpoints as tiny

pytestmark = pytest.mark.timeout(60)

# As in published files: GPT-2, o200k (GPT-4o, Llama 4), DeepSeek.
PUBLISHED = [
    *tiny.PATTERNS.values(),
    *_DEFAULT_PATTERNS,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
CATASTROPHIC = [
    r"(.+)+x",
    r"(a+)+$",
    r"(\w+\s?)*;",
    r"(q+)+z",  # backtracks on letters of its own only
    r"(?:zz|z)+y",
    r"(\u0071+)+!",
    r"^(\d+)*\.$",
    r"(ab)*(ab)*(ab)*(ab)*c",  # a power of the length, not an exponential
    r"\p{L}*\p{L}*\p{L}*\d",
]


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def several(kind: str, items: list) -> dict:
    return {"type": "Sequence", kind: items}


@pytest.mark.parametrize("expression", PUBLISHED, ids=lambda expression: expression[:20])
def test_published_expressions_are_accepted(expression):
    check_limits({"pre_tokenizer": several("pretokenizers", [split(expression), {"type": "ByteLevel"}])})


@pytest.mark.parametrize("expression", CATASTROPHIC)
def test_expressions_that_backtrack_are_refused_soon(expression):
    started = time.thread_time()
    with pytest.raises(ValueError, match=r"^its regular expression .* (cannot split|takes .* s to split) .* times"):
        check_limits({"pre_tokenizer": split(expression)})
    assert time.thread_time() - started < 10


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": several("normalizers", [{"type": "NFC"}, replace({"Regex": "(.+)+x"}, " ")])},
        {"pre_tokenizer": several("pretokenizers", [several("pretokenizers", [split("(.+)+x")])])},
        {"decoder": several("decoders", [replace({"Regex": "(.+)+x"}, " "), {"type": "Fuse"}])},
    ],
    ids=lambda part: next(iter(part)),
)
def test_every_part_of_a_file_is_checked_and_the_file_named(tmp_path, part):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tiny.make_tokenizer("smollm").to_str()) | part))
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged: its regular expression '\(\.\+\)\+x' cannot"):
        load_tokenizer(path)


def test_chains_of_replacements_that_multiply_a_text_are_refused_before_they_run(tmp_path):
    fields = json.loads(tiny.make_tokenizer("smollm").to_str())
    for pattern, content, count in (
        ({"String": "a"}, "aa", 40),
        ({"Regex": ""}, "a", 40),
        ({"String": "a"}, "a" * 2000, 1),
    ):
        for part, name in (("normalizer", "normalizers"), ("decoder", "decoders")):
            path = tmp_path / "tokenizer.json"
            path.write_text(json.dumps(fields | {part: several(name, [replace(pattern, content)] * count)}))
            with pytest.raises(ValueError, match=f"the replacements of its {part} make a text more than 1000 times"):
                load_tokenizer(path)
    spaces = replace({"String": " "}, "\u2581")
    check_limits({"normalizer": several("normalizers", [spaces] * 40), "decoder": replace({"String": "\u2581"}, " ")})


def test_a_text_that_the_library_gives_up_on_is_one_value_error():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(.+)+x"), "isolated")
    assert encode(tokenizer, "a") == [0]
    with pytest.raises(ValueError, match=r"fails at this text of 66 characters .*retry-limit.*shorten it, or split it"):
        encode(tokenizer, "a" * 64 + "\nx")
    assert encode_texts(tokenizer, ["a", ""]) == [[0], []]
    with pytest.raises(ValueError, match=r"fails at this text of 67 characters .*retry-limit"):
        encode_texts(tokenizer, ["a", "a" * 64 + "\nx"])

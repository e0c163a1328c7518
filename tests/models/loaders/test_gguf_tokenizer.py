"""Tokenizers built from GGUF metadata give the ids of the model's own tokenizer.json."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar_jax.models.loaders.gguf.metadata import Metadata
from bipolar_jax.models.loaders.gguf.tokenizer import build_tokenizer
from tests.support import tiny_checkpoints as tiny

KINDS = ("smollm", "gpt-2", "llama-bpe", "qwen2")
TRICKY = (
    "",
    " ",
    "   leading and trailing   ",
    "In 1984, there were 365 days and 1234567 seconds.",
    "it's IT'S we'll WE'LL they've don't 'tis",
    "line\nbreaks\r\n\r\n\n\n\ttabs\t\t and  double  spaces",
    "Grüße, naïve café, cafe\u0301, Ａ ｆｕｌｌ ｗｉｄｔｈ",
    "東京と大阪 привет मानक 한국어 العربية",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "١٢٣ ½ ² Ⅷ 1²",
    "\x00\x01\x7f control",
    "def f(x):\n    return x**2  # comment\n",
    "<|begin|>system<|end|><|begin|>user says <tool>hi</tool><|turn|>",
    "a<|begin|>b <|end|> c<|notatoken|>",
    "zero\u200bwidth and no\u00a0break",
)


def values(kind: str, /, **changes) -> dict:
    checkpoint = tiny.make(pre=kind)
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    found = tiny.gguf_metadata(checkpoint) | changes
    return {key: value for key, value in found.items() if value is not None}


def built(kind: str, /, **changes):
    return build_tokenizer(Metadata(values(kind, **changes), "model.gguf"), vocab_size=1000)


@pytest.mark.parametrize("pre", KINDS)
@pytest.mark.parametrize("text", TRICKY)
def test_agrees_with_the_original(pre, text):
    ours, theirs = built(pre), tiny.make_tokenizer(pre)
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.encode(text).tokens == theirs.encode(text).tokens
    ids = ours.encode(text).ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(), pre=st.sampled_from(KINDS))
def test_any_text_round_trips(text, pre):
    tokenizer = built(pre)
    again = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
    assert again == (tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text)


@pytest.mark.parametrize(
    ("pre", "pre_tokens"),
    [
        ("smollm", ["In", "Ġ", "1", "9", "8", "4", ",", "Ġit", "'s"]),
        ("gpt-2", ["In", "Ġ1984", ",", "Ġit", "'s"]),
        ("llama-bpe", ["In", "Ġ", "198", "4", ",", "Ġit", "'s"]),
        ("qwen2", ["In", "Ġ", "1", "9", "8", "4", ",", "Ġit", "'s"]),
    ],
)
def test_digits_are_split(pre, pre_tokens):
    assert [text for text, _ in built(pre).pre_tokenizer.pre_tokenize_str("In 1984, it's")] == pre_tokens


def test_control_and_user_tokens_are_never_split():
    ids = built("smollm").encode("x<|begin|><tool>").ids
    assert ids[1] == 0
    assert built("smollm").id_to_token(ids[2]) == tiny.USER_TOKEN
    assert built("smollm").decode(ids) == f"x{tiny.USER_TOKEN}", "decoding skips control tokens only"


@pytest.mark.parametrize(
    ("pre", "flag", "prepends"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_prepended_if_the_file_asks_for_it(pre, flag, prepends):
    ids = built(pre, add_bos_token=flag).encode("hello").ids
    assert (ids[0] == 0) == prepends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no tokenizer .* load the model's Hugging Face directory"),
        ({"model": "bert"}, "'bert' tokenizer, supported are 'gpt2' .* 'llama' .* Hugging Face directory"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken', supported are smollm, gpt-2, .* Hugging Face directory"),
        ({"tokens": None}, "no metadata key 'tokenizer.ggml.tokens'"),
        ({"merges": None}, "no metadata key 'tokenizer.ggml.merges'"),
        ({"token_type": None}, "no metadata key 'tokenizer.ggml.token_type'"),
        ({"token_type": [1, 2]}, "tokens but 2 token types"),
        ({"tokens": [1, 2]}, "expected an array of str"),
        ({"merges": ["a b c"]}, "the merge 'a b c', which is not a pair"),
        ({"merges": ["<no> <such>"]}, "inconsistent tokenizer .*download it again"),
        ({"add_bos_token": True, "bos_token_id": None}, "no metadata key 'tokenizer.ggml.bos_token_id'"),
        ({"add_bos_token": True, "bos_token_id": 5000}, "BOS token 5000, but"),
    ],
)
def test_unsupported_tokenizers_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        built("smollm", **changes)
    assert "model.gguf" in str(caught.value)


DEFAULT_PIECES = {
    "In 1984, it's 12345.": ["In", "Ġ", "198", "4", ",", "Ġit", "'", "s", "Ġ", "123", "45", "."],
    "f(x) == a+b\n\n  y": ["f", "(", "x", ")", "Ġ", "==", "Ġa", "+", "b", "ĊĊĠ", "Ġy"],
}


@pytest.mark.parametrize("text", DEFAULT_PIECES)
def test_without_a_pre_tokenizer_texts_are_split_as_in_llama_cpp(text):
    """Each of its four expressions splits what the one before has left."""
    with pytest.warns(UserWarning, match=r"model.gguf has no 'tokenizer.ggml.pre'.*convert it again"):
        old = built("default", pre=None)
    for tokenizer in (old, built("default")):
        assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == DEFAULT_PIECES[text]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert old.encode("a").ids[0] != 0, "no BOS"


def test_llama_3_has_other_names():
    for name in ("llama3", "llama-v3"):
        expected = built("llama-bpe", add_bos_token=None).encode("In 1984").ids
        assert built("llama-bpe", pre=name, add_bos_token=None).encode("In 1984").ids == expected


def test_eos_is_appended_if_the_file_asks_for_it():
    ids = built("smollm", add_eos_token=True, add_bos_token=True).encode("hello").ids
    assert (ids[0], ids[-1]) == (0, 1)


def test_too_many_and_duplicate_tokens_are_rejected():
    tokens = values("smollm")["tokenizer.ggml.tokens"]
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens but vocab_size=100"):
        build_tokenizer(Metadata(values("smollm"), "model.gguf"), vocab_size=100)
    with pytest.raises(ValueError, match="1 duplicate tokens"):
        built("smollm", tokens=[*tokens[:-1], tokens[5]])


def test_an_implausible_number_of_special_tokens_is_refused():
    tokens = [f"t{index}" for index in range(70_000)]
    with pytest.raises(ValueError, match="70,000 control and user-defined tokens, more than 65,536"):
        build_tokenizer(
            Metadata(values("smollm", tokens=tokens, token_type=[3] * 70_000), "model.gguf"), vocab_size=70_000
        )

"""Text from ids one by one: whole characters, nothing of the prompt, and nothing from a stop string on."""

from __future__ import annotations

import random

import pytest
import tokenizers

from bipolar_jax.models.inference.text_stream import TextStream
from tests.support.tiny_checkpoints import make_tokenizer

TEXTS = ["the quick brown fox", " Grüße aus Köln, 東京 and 😀😀!", "a\ufffdb", "end\ufffd", "  two spaces \n", "😀"]


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2's: characters outside the vocabulary are tokens of one byte; a space begins a word."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "\u2581b"]:
        vocab[token] = len(vocab)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    parts = tokenizers.normalizers
    tokenizer.normalizer = parts.Sequence([parts.Prepend("\u2581"), parts.Replace(" ", "\u2581")])
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence(
        [parts.Replace("\u2581", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


TOKENIZERS = {"byte-level": make_tokenizer("smollm"), "byte-fallback": byte_fallback_tokenizer()}


def pieces(tokenizer, prompt, tokens, stop=()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    return [*map(stream.push, tokens), stream.flush()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("prompt", ["a b", "the quick \ufffd", "東京", ""])
@pytest.mark.parametrize("text", TEXTS)
def test_the_text_is_what_the_tokens_add_to_the_prompt(tokenizer, prompt, text):
    ids = tokenizer.encode(prompt).ids
    both = tokenizer.encode(prompt + text).ids
    if both[: len(ids)] != ids:
        pytest.skip("the tokenizer joins prompt and text")
    added = "".join(pieces(tokenizer, ids, both[len(ids) :]))
    assert prompt + added == tokenizer.decode(both)
    for piece in pieces(tokenizer, ids, both[len(ids) :]):
        assert "\ufffd" not in piece or "\ufffd" in text


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("left_out", [1, 2])
@pytest.mark.parametrize("before", ["the quick ", "", "京"])
def test_a_prompt_that_ends_inside_a_character_is_not_written_again(tokenizer, left_out, before):
    ids = tokenizer.encode(before + "東").ids
    following = tokenizer.encode("b").ids[-1:]
    assert "".join(pieces(tokenizer, ids[:-left_out], ids[-left_out:] + following)).strip() in ("東b", "東 b")


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_no_sequence_of_ids_fails_or_repeats_the_prompt(tokenizer):
    """Random ids are mostly invalid UTF-8; written is not more than the tokens have, and no part of the prompt."""
    rng = random.Random(0)
    for _ in range(200):
        prompt = tokenizer.encode("Zebra-prompt " + "東" * rng.randint(0, 1)).ids[: rng.randint(0, 40)]
        tokens = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(30)]
        text = "".join(pieces(tokenizer, prompt, tokens))
        assert "Zebra" not in text
        assert len(text) <= len(tokenizer.decode(tokens)) + 12  # a run that became invalid may count twice


def test_bytes_that_make_a_run_invalid_do_not_repeat_it():
    tokenizer = TOKENIZERS["byte-fallback"]
    byte = {value: tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    tokens = [byte[value] for value in "東".encode()] + [byte[0xE4], tokenizer.token_to_id("b")]
    assert tokenizer.decode(tokens) == "\ufffd" * 4 + "b"
    assert pieces(tokenizer, [], tokens) == ["", "", "東", "", "\ufffdb", ""]


def test_endless_invalid_bytes_are_written_after_a_while():
    tokenizer = TOKENIZERS["byte-fallback"]
    stream = TextStream(tokenizer)
    assert any(stream.push(tokenizer.token_to_id("<0xFF>")) for _ in range(20))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["brown"], "the quick "),
        (["fox", "quick"], "the "),
        (["k b"], "the quic"),
        (["zebra"], "the quick brown fox"),
        (["foxes", "x?"], "the quick brown fox"),
        (["the"], ""),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stop, expected):
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, [], stop)
    written = ""
    for token in tokenizer.encode("the quick brown fox").ids:
        written += stream.push(token)
        assert expected.startswith(written)
        assert stream.push(token) == "" if stream.stopped else True
    assert written + stream.flush() == expected
    assert stream.stopped == (expected != "the quick brown fox")

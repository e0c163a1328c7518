"""SentencePiece tokenizers of GGUF files give the ids of llama.cpp's algorithm, written out here."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar_jax.models.loaders import load_gguf
from bipolar_jax.models.loaders.gguf.metadata import Metadata
from bipolar_jax.models.loaders.gguf.tokenizer import build_tokenizer
from tests.support import tiny_checkpoints as tiny

WORDS = [
    "_the",
    "_qu",
    "ick",
    "_quick",
    "_br",
    "own",
    "_brown",
    "he",
    "th",
    "ck",
    "ic",
    "_b",
    "__",
    "_a",
    "aa",
    "aaa",
    "qu",
    "ow",
    "_q",
    "_t",
    "er",
    "東京",
    "東",
    "京",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *BYTES,
    *(word.replace("_", "\u2581") for word in WORDS),
    "\u2581",
    *"abcdehiknoqrtuw",
]
TOKENS += ["<tool>"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 260), 4]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(TOKENS) - 259)]
TEXTS = (
    "",
    " ",
    "the quick brown",
    "  two  spaces ",
    "aaaa a aaaaa",
    "\u6771\u4eac\u6771 caf\u00e9 \U0001f600",
    "a\nb\tc",
    "THE quickquick",
)


def values(**changes) -> dict:
    found = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": TYPES,
        "scores": SCORES,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def built(**changes):
    return build_tokenizer(Metadata(values(**changes), "model.gguf"), vocab_size=1000)


def by_llama_cpp(text: str) -> list[int]:
    """Joins the two neighbours whose joined text has the highest score, the leftmost of equals, while there are any."""
    ids = {token: index for index, token in enumerate(TOKENS)}
    symbols = list((" " + text).replace(" ", "\u2581")) if text else []
    while True:
        joined = [(SCORES[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_as_llama_cpp_does_and_come_back(text):
    tokenizer = built()
    assert tokenizer.encode(text).ids == [1, *by_llama_cpp(text)]
    assert tokenizer.encode(text, add_special_tokens=False).ids == by_llama_cpp(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text("thequickbrown a\u6771\u4eac", max_size=30))
def test_any_text_is_encoded_as_llama_cpp_does(text):
    assert built().encode(text, add_special_tokens=False).ids == by_llama_cpp(text)


def test_special_tokens_are_never_split_and_text_after_them_begins_with_a_space():
    ids = built(add_bos_token=False).encode("a<s>b<tool>").ids
    tokens = [TOKENS[token] for token in ids]
    assert tokens == ["\u2581a", "<s>", "\u2581b", "<tool>"]


def test_switches_of_the_file():
    assert built(add_bos_token=False, add_eos_token=True).encode("a").ids[-1] == 2
    bare = built(add_space_prefix=False, add_bos_token=False)
    assert [TOKENS[token] for token in bare.encode("a b").ids] == ["a", "\u2581b"]
    assert bare.decode(bare.encode("a b").ids) == "a b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "no metadata key 'tokenizer.ggml.scores'"),
        ({"scores": [0.0]}, "tokens but 1 scores"),
        ({"scores": [1] * len(TOKENS)}, "expected an array of float"),
        ({"tokens": ["x" + token for token in TOKENS]}, "without the token <0x00> of a byte"),
        ({"unknown_token_id": 5000}, "UNKNOWN token 5000, but"),
        ({"bos_token_id": 5000}, "BOS token 5000, but"),
    ],
)
def test_inconsistent_vocabularies_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"model.gguf.*{message}"):
        built(**changes)


def test_a_file_with_such_a_tokenizer_loads(tmp_path):
    checkpoint = tiny.make()
    rows = len(checkpoint.weights["model.embed_tokens.weight"])
    unused = rows - len(TOKENS)
    metadata = values(
        tokens=[*TOKENS, *(f"<unused{i}>" for i in range(unused))],
        token_type=[*TYPES, *[5] * unused],
        scores=[*SCORES, *[0.0] * unused],
    )
    missing = ("pre", "merges", "bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")
    metadata |= {f"tokenizer.ggml.{name}": None for name in missing}
    loaded = load_gguf(tiny.write_gguf(tiny.make(metadata=metadata), tmp_path / "model.gguf"))
    assert (loaded.model.config.bos_id, loaded.model.config.eos_ids) == (1, (2,))
    assert loaded.tokenizer.encode("the quick").ids == [1, *by_llama_cpp("the quick")]

"""The vocabulary in a GGUF file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bipolar_jax.models.loaders.gguf.metadata import Metadata

if TYPE_CHECKING:
    import tokenizers

REMEDY = "load the model's Hugging Face directory, with its tokenizer.json, instead"
# Types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Published vocabularies have some thousand; the automaton that finds them in a text takes much memory for each.
_MOST_SPECIAL = 1 << 16
_KEY = "tokenizer.ggml"
# SentencePiece's ids of absent keys, as llama.cpp has them.
_DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def read_tokens(metadata: Metadata, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types.

    Raises:
      ValueError: a key is missing or of another type, or the vocabulary contradicts itself or the model.
    """
    tokens, types = (
        metadata.require(metadata.array(f"{_KEY}.{name}", kind), f"{_KEY}.{name}")
        for name, kind in (("tokens", str), ("token_type", int))
    )
    problem, distinct = None, len(set(tokens))
    if len(types) != len(tokens):
        problem = f"{len(tokens)} tokens but {len(types)} token types"
    elif len(tokens) > vocab_size:
        problem = f"{len(tokens)} tokens but {vocab_size=}"
    elif distinct != len(tokens):
        problem = f"{len(tokens) - distinct} duplicate tokens"
    elif (special := sum(kind in (CONTROL, USER_DEFINED) for kind in types)) > _MOST_SPECIAL:
        problem = f"{special:,} control and user-defined tokens, more than {_MOST_SPECIAL:,}"
    if problem:
        raise ValueError(f"{metadata.source} has a tokenizer with {problem}: download it again")
    return tokens, types


def add_special_tokens(library: Any, tokenizer: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Marks the tokens that texts are split at first; they keep their ids. Decoding skips control tokens by default."""
    for kind in (CONTROL, USER_DEFINED):
        tokenizer.add_tokens(
            [
                library.AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == kind and token
            ]
        )


def special_id(metadata: Metadata, name: str, count: int) -> int:
    """The id of the token "bos", "eos" or "unknown". Raises ValueError if it is missing or not below `count`."""
    key = f"{_KEY}.{name}_token_id"
    default = _DEFAULT_IDS[name] if metadata.text(f"{_KEY}.model") == "llama" else None
    token = metadata.require(metadata.integer(key, default), key)
    if token >= count:
        raise ValueError(f"{metadata.source} has {name.upper()} token {token}, but {count} tokens: download it again")
    return token

"""Reads tokenizers in the format of tokenizer.json, without the settings of a single call."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipolar_jax.checkpoint.json_text import parse_json
from bipolar_jax.extras import require
from bipolar_jax.models.tokenizer_limits import check_limits

if TYPE_CHECKING:
    import tokenizers

# Options of one call of `encode`, which fine-tuning tools leave in the file.
_CALL_SETTINGS = ("truncation", "padding")
# Texts that a usable tokenizer encodes at once. Some rules fail only when they meet a text, such as a normalizer with
# damaged tables.
_PROBES = (
    "a" * 64 + "!",
    " " * 64 + "a",
    "1" * 64 + "a",
    "aA1 .-'\n\t" * 8,
    "é東😀" * 8,
    "!" * 64 + "a",
    "\n" * 64 + "a",
)


def load_tokenizer(path: Path, vocab_size: int | None = None) -> tokenizers.Tokenizer:
    """Reads tokenizer.json. Raises FileNotFoundError, and ValueError as `parse_tokenizer`."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: download it, or convert the slow tokenizer to it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again") from error
    return parse_tokenizer(text, path, vocab_size)


def parse_tokenizer(text: str, source: str | os.PathLike[str], vocab_size: int | None = None) -> tokenizers.Tokenizer:
    """Makes a tokenizer that encodes whole texts: truncation and padding are off.

    Padding tokens with ids past the vocabulary are left out, because the model has no embedding for them.

    Args:
      text: content of a tokenizer.json.
      source: the file, for messages.
      vocab_size: the model's vocabulary size, which all ids must be below; None accepts all.

    Raises:
      ValueError: damage, an unknown feature, ids outside the vocabulary, or rules beyond `check_limits`.
      ModuleNotFoundError: tokenizers is not installed.
    """
    library = require("tokenizers", "models")
    tokenizer = None
    with tokenizer_errors(source):
        fields: Any = parse_json(text)
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}, expected an object")
        if _drop_call_settings(fields, vocab_size):
            text = json.dumps(fields)
        tokenizer = library.Tokenizer.from_str(text)
        check_limits(fields)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{source} has token id {largest}, but config.json has {vocab_size=}, so the model has no embedding for "
            "it: use the tokenizer.json that belongs to these weights"
        )
    check_tokenizer(tokenizer, source)
    return tokenizer


def check_tokenizer(tokenizer: tokenizers.Tokenizer, source: str | os.PathLike[str]) -> None:
    """Encodes and decodes a few texts. Raises ValueError if the tokenizer cannot."""
    with tokenizer_errors(source):
        for probe in _PROBES:
            tokenizer.decode(tokenizer.encode(probe).ids, skip_special_tokens=False)


@contextlib.contextmanager
def tokenizer_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors of the tokenizers library in the block into a ValueError that names `source`.

    The library raises bare Exceptions, and where its Rust code panics an exception that is none.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{source} is damaged: {message:.300}; download it again") from error


def encode(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises ValueError if the tokenizer fails at it, as by an expression that backtracks."""
    with _encoding_errors(len(text)):
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def encode_texts(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, without special tokens, in parallel. Raises ValueError as `encode`."""
    with _encoding_errors(sum(map(len, texts))):
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@contextlib.contextmanager
def _encoding_errors(characters: int) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics of the library are no Exceptions
        raise ValueError(
            f"the tokenizer fails at this text of {characters:,} characters ({error!s:.200}): shorten it, or split it"
        ) from error


def _drop_call_settings(fields: dict[str, Any], vocab_size: int | None) -> bool:
    """Whether there was something to change; else the library reads what the file says."""
    changed = [name for name in _CALL_SETTINGS if fields.pop(name, None) is not None]
    added = fields.get("added_tokens")
    if vocab_size is not None and isinstance(added, list):
        kept = [token for token in added if not _is_padding_past(token, vocab_size)]
        if len(kept) < len(added):
            fields["added_tokens"], changed = kept, True
    return bool(changed)


def _is_padding_past(token: Any, vocab_size: int) -> bool:
    if not isinstance(token, dict) or type(token.get("id")) is not int or token["id"] < vocab_size:
        return False
    content = token.get("content")
    return token.get("special") is True and isinstance(content, str) and "pad" in content.lower()

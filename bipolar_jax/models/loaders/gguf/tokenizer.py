"""Builds the tokenizer that a GGUF file describes, with the tokenizers library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.gguf.config import Metadata

if TYPE_CHECKING:
    import tokenizers

# Splitting patterns of the models' own tokenizer.json files, which differ in the digits per pre-token.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _SPLIT.format(digits=r"\p{N}{1,3}")
_QWEN2_PATTERN = _SPLIT.format(digits=r"\p{N}")
_PRE_TOKENIZERS = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
_CONTROL, _USER_DEFINED = 3, 4
_REMEDY = "load the model's Hugging Face directory, with its tokenizer.json, instead"


def build_tokenizer(metadata: Metadata, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, which never splits control and user-defined tokens.

    Args:
      metadata: the file's metadata.
      vocab_size: the model's vocabulary size.

    Raises:
      ValueError: no tokenizer, an unsupported one, or one that contradicts itself.
    """
    library = require("tokenizers", "models")
    kind = metadata.text("tokenizer.ggml.model")
    if kind is None:
        raise ValueError(f"{metadata.source} has no tokenizer (key 'tokenizer.ggml.model'): {_REMEDY}")
    pre = metadata.text("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"{metadata.source} has a {kind!r} tokenizer, supported is 'gpt2' (byte-level BPE): {_REMEDY}")
    if pre not in _PRE_TOKENIZERS:
        supported = ", ".join(_PRE_TOKENIZERS)
        raise ValueError(f"{metadata.source} has pre-tokenizer {pre!r}, supported are {supported}: {_REMEDY}")
    tokens, types, merges = _vocabulary(metadata, vocab_size)
    # As in llama.cpp, Llama 3's texts start with BOS unless the file sets this key.
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = _bos(metadata, tokens) if add_bos else None
    try:
        return _assemble(library, pre, tokens, types, merges, bos)
    except Exception as error:  # the library raises bare Exception, for example on merges outside the vocabulary
        raise ValueError(f"{metadata.source} has an inconsistent tokenizer ({error}): download it again") from error


def _assemble(
    library: Any, pre: str, tokens: list[str], types: list[int], merges: list[tuple[str, ...]], bos: int | None
) -> tokenizers.Tokenizer:
    # Llama 3 uses a token for a whole pre-token even if the merges do not produce it.
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(library, pre)
    tokenizer.decoder = library.decoders.ByteLevel()
    # These keep their ids from the vocabulary; decoding skips control tokens by default.
    for kind in (_CONTROL, _USER_DEFINED):
        tokenizer.add_tokens(
            [
                library.AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == kind and token
            ]
        )
    if bos is not None:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _vocabulary(metadata: Metadata, vocab_size: int) -> tuple[list[str], list[int], list[tuple[str, ...]]]:
    """Tokens by id, their types, and the merges by rank."""
    lists = {
        name: metadata.require(metadata.array(f"tokenizer.ggml.{name}", kind), f"tokenizer.ggml.{name}")
        for name, kind in (("tokens", str), ("token_type", int), ("merges", str))
    }
    tokens, types = lists["tokens"], lists["token_type"]
    merges = [tuple(merge.split(" ")) for merge in lists["merges"]]
    problem = None
    if len(types) != len(tokens):
        problem = f"{len(tokens)} tokens but {len(types)} token types"
    elif len(tokens) > vocab_size:
        problem = f"{len(tokens)} tokens but {vocab_size=}"
    elif len(set(tokens)) != len(tokens):
        problem = f"{len(tokens) - len(set(tokens))} duplicate tokens"
    elif bad := [merge for merge in merges if len(merge) != 2]:
        problem = f"the merge {' '.join(bad[0])!r}, which is not a pair"
    if problem:
        raise ValueError(f"{metadata.source} has a tokenizer with {problem}: download it again")
    return tokens, types, merges


def _pre_tokenizer(library: Any, pre: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    pre_tokenizers = library.pre_tokenizers
    if pre in ("llama-bpe", "qwen2"):
        pattern = library.Regex(_LLAMA3_PATTERN if pre == "llama-bpe" else _QWEN2_PATTERN)
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _bos(metadata: Metadata, tokens: list[str]) -> int:
    key = "tokenizer.ggml.bos_token_id"
    bos = metadata.require(metadata.integer(key), key)
    if bos >= len(tokens):
        raise ValueError(f"{metadata.source} has BOS token {bos}, but {len(tokens)} tokens: download it again")
    return bos

"""SentencePiece tokenizers of GGUF files (Llama 1 and 2, Mistral, TinyLlama), which store scores instead of merges.

llama.cpp joins, again and again, the two neighbours whose joined text is the token with the highest score, the
leftmost of equals. That is BPE with the merges of every token, in the order of the tokens' scores, which is how
transformers converts these tokenizers. What no token covers becomes tokens of single bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.gguf.metadata import Metadata
from bipolar_jax.models.loaders.gguf.vocabulary import (
    NORMAL,
    USER_DEFINED,
    add_special_tokens,
    read_tokens,
    special_id,
)

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
# Characters of the longest token that may be joined from others; SentencePiece's own limit is 16 by default.
_LONGEST = 256
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def build_sentencepiece(metadata: Metadata, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of key "tokenizer.ggml.model" = "llama".

    Raises:
      ValueError: a key is missing or of another type, or the vocabulary contradicts itself or the model.
    """
    library = require("tokenizers", "models")
    tokens, types = read_tokens(metadata, vocab_size)
    key = "tokenizer.ggml.scores"
    scores = metadata.require(metadata.array(key, float), key)
    if len(scores) != len(tokens):
        raise ValueError(
            f"{metadata.source} has a tokenizer with {len(tokens)} tokens but {len(scores)} scores: download it again"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if missing := next((token for token in _BYTES if token not in vocab), None):
        raise ValueError(
            f"{metadata.source} has a SentencePiece tokenizer without the token {missing} of a byte: download it again"
        )
    unknown = tokens[special_id(metadata, "unknown", len(tokens))]
    merges = _merges(tokens, types, scores, vocab)
    model = library.models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = library.Tokenizer(model)
    # llama.cpp begins every run of text between special tokens with a space.
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = library.normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        library.normalizers.Sequence([library.normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    decoders = library.decoders
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    add_special_tokens(library, tokenizer, tokens, types)
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, the highest score first, equal ones in the order of ids."""
    joinable = [i for i, kind in enumerate(types) if kind in (NORMAL, USER_DEFINED) and 1 < len(tokens[i]) <= _LONGEST]
    merges = []
    for index in sorted(joinable, key=lambda index: -scores[index]):
        token = tokens[index]
        pairs = [
            (token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab
        ]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges

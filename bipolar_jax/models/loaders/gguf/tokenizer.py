"""Builds the tokenizer that a GGUF file describes, with the tokenizers library."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.gguf.metadata import Metadata
from bipolar_jax.models.loaders.gguf.sentencepiece import build_sentencepiece
from bipolar_jax.models.loaders.gguf.vocabulary import REMEDY, add_special_tokens, read_tokens, special_id
from bipolar_jax.models.tokenizer_json import check_tokenizer

if TYPE_CHECKING:
    import tokenizers

# Splitting patterns of the models' own tokenizer.json files, which differ in the digits per pre-token.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _SPLIT.format(digits=r"\p{N}{1,3}")
_QWEN2_PATTERN = _SPLIT.format(digits=r"\p{N}")
# llama.cpp's rule for files without a pre-tokenizer: each expression splits what the one before has left.
_DEFAULT_PATTERNS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# llama.cpp's other names.
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
PRE_TOKENIZERS = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
_KEY = "tokenizer.ggml"


def build_tokenizer(metadata: Metadata, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file, which never splits control and user-defined tokens.

    Args:
      metadata: the file's metadata. Model "gpt2" is byte-level BPE, "llama" is SentencePiece BPE.
      vocab_size: the model's vocabulary size.

    Raises:
      ValueError: no tokenizer, an unsupported one, or one that contradicts itself.

    Warns:
      UserWarning: the file names no pre-tokenizer, so that llama.cpp's default splits texts, not the model's rule.
    """
    library = require("tokenizers", "models")
    kind = metadata.text(f"{_KEY}.model")
    if kind is None:
        raise ValueError(f"{metadata.source} has no tokenizer (key 'tokenizer.ggml.model'): {REMEDY}")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{metadata.source} has a {kind!r:.60} tokenizer, supported are 'gpt2' (byte-level BPE) and 'llama' "
            f"(SentencePiece): {REMEDY}"
        )
    with _errors(metadata.source):
        tokenizer = build_sentencepiece(metadata, vocab_size) if kind == "llama" else _build_bpe(metadata, vocab_size)
    _add_bos_and_eos(library, tokenizer, metadata, kind)
    check_tokenizer(tokenizer, metadata.source)
    return tokenizer


@contextlib.contextmanager
def _errors(source: str) -> Iterator[None]:
    """Errors of the tokenizers library become a ValueError that names the file; its Rust code may also panic."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, ValueError) and str(error).startswith(source):
            raise
        raise ValueError(f"{source} has an inconsistent tokenizer ({error!s:.200}): download it again") from error


def _build_bpe(metadata: Metadata, vocab_size: int) -> tokenizers.Tokenizer:
    pre = _pre(metadata)
    if pre not in PRE_TOKENIZERS:
        supported = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{metadata.source} has pre-tokenizer {pre!r:.60}, supported are {supported}: {REMEDY}")
    tokens, types = read_tokens(metadata, vocab_size)
    merges = metadata.require(metadata.array(f"{_KEY}.merges", str), f"{_KEY}.merges")
    if bad := next((merge for merge in merges if merge.count(" ") != 1), None):
        raise ValueError(
            f"{metadata.source} has a tokenizer with the merge {bad!r:.60}, which is not a pair: download it again"
        )
    return _assemble(require("tokenizers", "models"), pre, tokens, types, [tuple(merge.split(" ")) for merge in merges])


def _pre(metadata: Metadata) -> str:
    """The name of the pre-tokenizer; warns if the file has none."""
    pre = metadata.text(f"{_KEY}.pre")
    if pre is None:
        warnings.warn(
            f"{metadata.source} has no 'tokenizer.ggml.pre', as files of converters before May 2024: llama.cpp's "
            "default splits texts, and the model may have been trained with another rule; convert it again",
            stacklevel=2,
        )
        return "default"
    return _ALIASES.get(pre, pre)


def _assemble(
    library: Any, pre: str, tokens: list[str], types: list[int], merges: list[tuple[str, ...]]
) -> tokenizers.Tokenizer:
    # Llama 3 uses a token for a whole pre-token even if the merges do not produce it.
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(library, pre)
    tokenizer.decoder = library.decoders.ByteLevel()
    add_special_tokens(library, tokenizer, tokens, types)
    return tokenizer


def _pre_tokenizer(library: Any, pre: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    pre_tokenizers = library.pre_tokenizers
    if pre in ("llama-bpe", "qwen2"):
        pattern = library.Regex(_LLAMA3_PATTERN if pre == "llama-bpe" else _QWEN2_PATTERN)
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "default":
        splits = [pre_tokenizers.Split(library.Regex(pattern), behavior="isolated") for pattern in _DEFAULT_PATTERNS]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _add_bos_and_eos(library: Any, tokenizer: tokenizers.Tokenizer, metadata: Metadata, kind: str) -> None:
    """Texts begin with BOS and end with EOS as llama.cpp adds them: SentencePiece and Llama 3 begin with BOS."""
    begins = kind == "llama" or _ALIASES.get(pre := metadata.text(f"{_KEY}.pre", ""), pre) == "llama-bpe"
    added = [
        ("bos", metadata.flag(f"{_KEY}.add_bos_token", begins)),
        ("eos", metadata.flag(f"{_KEY}.add_eos_token", False)),
    ]
    ids = {name: special_id(metadata, name, tokenizer.get_vocab_size()) for name, wanted in added if wanted}
    texts = {name: tokenizer.id_to_token(token) for name, token in ids.items()}
    if not ids:
        return
    first, last = [texts["bos"]] if "bos" in ids else [], [texts["eos"]] if "eos" in ids else []
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", "$B", *last],
        special_tokens=[(texts[name], token) for name, token in ids.items()],
    )

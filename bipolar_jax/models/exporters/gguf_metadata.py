"""Metadata of a GGUF file: a model's config, its tokenizer and its chat template."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.loaders.gguf.chat_template import SPECIAL_TOKENS
from bipolar_jax.models.loaders.gguf.metadata import Metadata
from bipolar_jax.models.loaders.gguf.tokenizer import PRE_TOKENIZERS, build_tokenizer
from bipolar_jax.models.loaders.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from bipolar_jax.models.pretrained import PretrainedModel

_KEY = "tokenizer.ggml"
_SOURCE = "the exported file"


def config_metadata(config: TransformerConfig, arch: str) -> dict[str, Any]:
    """Keys of the config for an architecture. Raises ValueError for a rotary scaling without a form."""
    keys = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    keys |= {f"rope.scaling.{name}": value for name, value in _rope_scaling(config.rope_scaling).items()}
    return {f"{arch}.{name}": value for name, value in keys.items()}


def rope_factors(config: TransformerConfig) -> np.ndarray | None:
    """Divisors of the rotary frequencies, the tensor "rope_freqs.weight", float32; None without such a scaling.

    Of "llama3" those by which llama.cpp's converter writes it.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("factors", "llama3"):
        return None
    if scaling.kind == "factors":
        return np.array(scaling.factors, np.float32)
    positions = np.arange(0, config.head_dim, 2) / config.head_dim
    turns = scaling.original_context_length * config.rope_theta**-positions / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).astype(np.float32)


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None or scaling.kind in ("factors", "llama3"):
        return {}
    if scaling.kind == "linear":
        return {"type": "linear", "factor": float(scaling.factor)}
    if scaling.kind != "yarn":
        raise ValueError(f"RoPE scaling {scaling.kind!r} has no form in GGUF files of Llama models")
    keys = {
        "type": "yarn",
        "factor": float(scaling.factor),
        "original_context_length": scaling.original_context_length,
        "yarn_beta_fast": float(scaling.beta_fast),
        "yarn_beta_slow": float(scaling.beta_slow),
    }
    if scaling.attention_factor is not None:  # llama.cpp multiplies by this value
        keys["yarn_attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return keys


def tokenizer_metadata(pretrained: PretrainedModel) -> dict[str, Any]:
    """Keys of the tokenizer and the chat template, from which our loader builds an equal tokenizer.

    Raises:
      ValueError: a tokenizer that GGUF does not name: neither byte-level BPE with one of `PRE_TOKENIZERS`, nor
        SentencePiece's BPE.
    """
    config = pretrained.model.config
    fields = json.loads(pretrained.tokenizer.to_str())
    model = fields["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"a {model.get('type')!r:.40} tokenizer is not written to GGUF files, only BPE is")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(pretrained, model, fields["added_tokens"])
    common = {f"{_KEY}.tokens": tokens, f"{_KEY}.token_type": types, **_special_ids(pretrained)}
    common |= _added(pretrained)
    for keys in _candidates(model, tokens, merges):
        values = common | keys
        built = build_tokenizer(Metadata(values, _SOURCE), config.vocab_size)
        if _splitting(json.loads(built.to_str())) == _splitting(fields):
            return values
    raise ValueError(
        "the tokenizer splits texts in a way that GGUF does not name; files hold byte-level BPE of the kinds "
        f"{', '.join(PRE_TOKENIZERS)}, and SentencePiece's BPE: export to compressed-tensors, with its tokenizer.json"
    )


def _tokens(
    pretrained: PretrainedModel, model: dict[str, Any], added: list[dict[str, Any]]
) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types; ids of the embedding that have none are named as llama.cpp's converter does."""
    count = pretrained.model.config.vocab_size
    tokens = [pretrained.tokenizer.id_to_token(index) for index in range(count)]
    types = [UNUSED if token is None else NORMAL for token in tokens]
    tokens = [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]
    if model.get("byte_fallback"):
        for byte in range(256):
            index = model["vocab"].get(f"<0x{byte:02X}>")
            if index is not None:
                types[index] = BYTE
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _special_ids(pretrained: PretrainedModel) -> dict[str, Any]:
    """Ids of special tokens, and the chat template."""
    config, template = pretrained.model.config, pretrained.chat_template
    ids = dict(zip(("eos", "eot"), config.eos_ids, strict=False)) | (
        {} if config.bos_id is None else {"bos": config.bos_id}
    )
    keys: dict[str, Any] = {}
    if template is not None:
        keys["tokenizer.chat_template"] = template.source
        for name, text in template.special_tokens.items():
            token = pretrained.tokenizer.token_to_id(text)
            if name in SPECIAL_TOKENS and token is not None:
                ids.setdefault(SPECIAL_TOKENS[name], token)
    return keys | {f"{_KEY}.{name}_token_id": token for name, token in ids.items()}


def _added(pretrained: PretrainedModel) -> dict[str, Any]:
    """Whether texts begin with BOS and end with EOS. Raises ValueError for other tokens around them."""
    config, text = pretrained.model.config, "a"
    bare = pretrained.tokenizer.encode(text, add_special_tokens=False).ids
    whole = pretrained.tokenizer.encode(text).ids
    bos = config.bos_id is not None and whole[:1] == [config.bos_id] != bare[:1]
    eos = bool(config.eos_ids) and whole[-1:] == [config.eos_ids[0]] != bare[-1:]
    if whole != [*([config.bos_id] if bos else []), *bare, *([config.eos_ids[0]] if eos else [])]:
        raise ValueError(
            f"the tokenizer makes {whole} of {text!r}, which is not BOS, the text and EOS: GGUF says no more"
        )
    return {f"{_KEY}.add_bos_token": bos, f"{_KEY}.add_eos_token": eos}


def _candidates(model: dict[str, Any], tokens: list[str], merges: list[str]) -> Iterator[dict[str, Any]]:
    """Keys of every kind of tokenizer that it may be."""
    if not model.get("byte_fallback"):
        for pre in PRE_TOKENIZERS:
            yield {f"{_KEY}.model": "gpt2", f"{_KEY}.pre": pre, f"{_KEY}.merges": merges}
        return
    unknown = model["vocab"].get(model.get("unk_token"))
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", "", 1), len(ranks))
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for prefix in (True, False):
        keys = {f"{_KEY}.model": "llama", f"{_KEY}.scores": scores, f"{_KEY}.add_space_prefix": prefix}
        yield keys if unknown is None else keys | {f"{_KEY}.unknown_token_id": unknown}


def _splitting(fields: dict[str, Any]) -> Any:
    """What decides how texts become tokens, without what changes only the offsets of tokens."""
    model = fields["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    flags = [bool(model.get(name)) for name in ("ignore_merges", "byte_fallback", "fuse_unk")]
    added = sorted((token["id"], token["content"], token["special"]) for token in fields["added_tokens"])
    return fields["normalizer"], _steps(fields["pre_tokenizer"]), merges, flags, added


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [each for part in step["pretokenizers"] for each in _steps(part)]
    return [{name: value for name, value in step.items() if name != "trim_offsets"}]

"""What a Hugging Face config.json says about the model's shapes and constants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.loaders.naming import naming

MODEL_TYPES = ("llama", "mistral", "qwen2")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError where the file is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: download the whole model directory")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is damaged: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value


def read_config(directory: Path) -> TransformerConfig:
    """Translates config.json, and the token ids of generation_config.json where there is one.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: a model or feature we do not support, or a field that is missing or makes no sense.
    """
    path = directory / "config.json"
    fields = _Fields(read_json(path), path)
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{path} has model_type {model_type!r}, supported are {', '.join(MODEL_TYPES)}")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    context = fields.size("max_position_embeddings")
    _refuse_unsupported(fields, model_type, context)
    rope = _rope_fields(fields)
    bos_id, eos_ids = _token_ids(fields, directory)
    scaling = _rope_scaling(rope, context)
    translated = dict(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", max(hidden // heads, 1)),
        ffn_size=fields.size("intermediate_size"),
        context_length=context,
        rope_theta=rope.number("rope_theta", 10000.0),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        # Qwen2 has these three biases without saying so.
        qkv_bias=model_type == "qwen2",
        bos_id=bos_id,
        eos_ids=eos_ids,
    )
    with naming(path):
        return TransformerConfig(**translated, rope_scaling=RopeScaling(**scaling) if scaling else None)


class _Fields:
    """Typed look-ups in one JSON object; null is the same as absent."""

    def __init__(self, values: dict[str, Any], source: Path):
        self.values, self.source = values, source

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(name, value, "an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value <= 0:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def nested(self, name: str) -> _Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return _Fields(value, self.source)

    def _wrong(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self.source}: {name} is {value!r:.60}, expected {wanted}")


def _refuse_unsupported(fields: _Fields, model_type: str, context: int) -> None:
    """Raises ValueError for what would load and then compute something else."""
    path = fields.source
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{path} has hidden_act {activation!r}, supported is 'silu'")
    if fields.flag("attention_bias", False):
        raise ValueError(f"{path} has attention_bias true, which adds a bias to o_proj too: that is not supported")
    if fields.flag("mlp_bias", False):
        raise ValueError(f"{path} has mlp_bias true: biases in the feed-forward block are not supported")
    if "quantization_config" in fields.values:
        raise ValueError(f"{path} has a quantization_config: load the unquantized model, or a GGUF file, instead")
    # Qwen2 states a window even where it does not use it.
    uses_window = fields.flag("use_sliding_window", False) if model_type == "qwen2" else model_type == "mistral"
    window = fields.get("sliding_window")
    if uses_window and (model_type == "qwen2" or (window is not None and window < context)):
        raise ValueError(
            f"{path} attends to a sliding window of {window} of {context} positions: only full attention is supported"
        )


def _rope_fields(fields: _Fields) -> _Fields:
    """Both published forms as one: rope_parameters (new), or rope_scaling beside rope_theta (old)."""
    rope = fields.nested("rope_parameters") if fields.get("rope_parameters") else fields.nested("rope_scaling")
    shared = {name: fields.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    return _Fields({**{k: v for k, v in shared.items() if v is not None}, **rope.values}, fields.source)


def _rope_scaling(rope: _Fields, context: int) -> dict[str, Any] | None:
    """Fields of a RopeScaling."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.number("partial_rotary_factor", 1.0) != 1:
        raise ValueError(f"{rope.source} rotates only a part of each head (partial_rotary_factor): not supported")
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return dict(kind="linear", factor=rope.number("factor"))
    original = rope.size("original_max_position_embeddings", context)
    if kind == "llama3":
        return dict(
            kind="llama3",
            factor=rope.number("factor"),
            original_context_length=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind != "yarn":
        raise ValueError(f"{rope.source} has RoPE scaling {kind!r}, supported are default, linear, llama3, yarn")
    if not rope.flag("truncate", True):
        raise ValueError(f"{rope.source} has YaRN with truncate false: only the truncated band limits are supported")
    factor = rope.number("factor")
    return dict(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: _Fields, factor: float) -> float | None:
    """Explicit, or the ratio of DeepSeek's two scales, or None: derived from `factor` alone."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    above, below = (0.1 * rope.number(name) * math.log(factor) + 1.0 for name in ("mscale", "mscale_all_dim"))
    return above / below


def _token_ids(fields: _Fields, directory: Path) -> tuple[int | None, tuple[int, ...]]:
    """BOS and EOS; generation_config.json knows the end of a chat turn, so it goes first."""
    sources = [fields]
    path = directory / "generation_config.json"
    if path.is_file():
        sources.insert(0, _Fields(read_json(path), path))
    found: dict[str, list[int]] = {"bos_token_id": [], "eos_token_id": []}
    for name in found:
        for source in sources:
            ids = source.get(name, [])
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(token, int) and 0 <= token < fields.size("vocab_size") for token in ids):
                raise ValueError(f"{source.source}: {name} is {ids}, expected ids below {fields.size('vocab_size')}")
            found[name] = found[name] or ids
    bos = found["bos_token_id"]
    return (bos[0] if bos else None), tuple(found["eos_token_id"])

"""Reads config.json of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.architectures.bitnet import BITNET
from bipolar_jax.models.loaders.huggingface.architectures.bloom import BLOOM
from bipolar_jax.models.loaders.huggingface.architectures.gemma2 import GEMMA2
from bipolar_jax.models.loaders.huggingface.architectures.gemma3 import GEMMA3
from bipolar_jax.models.loaders.huggingface.architectures.llama import LLAMA
from bipolar_jax.models.loaders.huggingface.architectures.mixtral import MIXTRAL
from bipolar_jax.models.loaders.huggingface.architectures.opt import OPT
from bipolar_jax.models.loaders.huggingface.architectures.phi3 import PHI3
from bipolar_jax.models.loaders.huggingface.architectures.qwen3 import QWEN3
from bipolar_jax.models.loaders.huggingface.architectures.qwen3_moe import QWEN3_MOE
from bipolar_jax.models.loaders.huggingface.json_fields import Fields, read_json

# By the model_type of config.json.
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "bitnet": BITNET,
    "opt": OPT,
    "bloom": BLOOM,
}


def read_config(directory: Path) -> tuple[Architecture, TransformerConfig]:
    """Reads config.json, and token ids from generation_config.json if it exists.

    Returns:
      The stored form of the architecture, and the model's config.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported model or feature, or a missing or invalid field.
    """
    path = directory / "config.json"
    fields = Fields(read_json(path), path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"{path} has model_type {model_type!r:.60}, supported are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    fields = _with_defaults(fields, architecture)
    translated = architecture.translate(fields)
    bos_id, eos_ids = _token_ids(fields, directory)
    with errors_name(path):
        return architecture, TransformerConfig(
            **translated, vocab_size=fields.size("vocab_size"), bos_id=bos_id, eos_ids=eos_ids
        )


def _with_defaults(fields: Fields, architecture: Architecture) -> Fields:
    """The fields of the text model, with the architecture's defaults for absent ones."""
    values = fields.values
    if architecture.text_config is not None and architecture.text_config in values:
        text = fields.nested(architecture.text_config).values
        ids = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
        values = {name: values[name] for name in ids if name in values} | text
    return Fields({**architecture.defaults, **values}, fields.source)


def _token_ids(fields: Fields, directory: Path) -> tuple[int | None, tuple[int, ...]]:
    """BOS and EOS ids; generation_config.json goes first, because it includes the end of a chat turn."""
    sources = [fields]
    path = directory / "generation_config.json"
    if path.is_file():
        sources.insert(0, Fields(read_json(path), path))
    found: dict[str, list[int]] = {"bos_token_id": [], "eos_token_id": []}
    for name in found:
        for source in sources:
            ids = source.get(name, [])
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(token) is int and 0 <= token < fields.size("vocab_size") for token in ids):
                raise source.wrong(name, ids, f"ids below {fields.size('vocab_size')}")
            found[name] = found[name] or ids
    bos = found["bos_token_id"]
    return (bos[0] if bos else None), tuple(found["eos_token_id"])

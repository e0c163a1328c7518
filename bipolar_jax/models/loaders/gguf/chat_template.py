"""Reads the chat template of a GGUF file."""

from __future__ import annotations

from bipolar_jax.models.chat import ChatTemplate
from bipolar_jax.models.loaders.gguf.metadata import Metadata

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_chat_template(metadata: Metadata) -> ChatTemplate | None:
    """The template of key "tokenizer.chat_template"; None without one.

    Raises:
      ValueError: a key of another type.
    """
    source = metadata.text("tokenizer.chat_template")
    if source is None:
        return None
    tokens = metadata.array("tokenizer.ggml.tokens", str) or []
    ids = {name: metadata.integer(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    return ChatTemplate(source, {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)})

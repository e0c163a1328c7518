"""Reads the chat template of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bipolar_jax.models.chat import ChatTemplate
from bipolar_jax.models.loaders.huggingface.json_fields import Fields, read_json

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template in chat_template.jinja, else in tokenizer_config.json; None without one.

    Of several named templates in tokenizer_config.json it is the one named "default".

    Raises:
      ValueError: tokenizer_config.json is damaged, or has a template of another kind.
    """
    path, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    fields = Fields(read_json(path) if path.is_file() else {}, path)
    source = _source(fields)
    if file.is_file():
        try:
            source = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is damaged: {error}; download it again") from error
    if source is None:
        return None
    tokens = {name: _text(fields.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


def _source(fields: Fields) -> str | None:
    value = fields.get("chat_template")
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise fields.wrong("chat_template", value, "a template, or a list of named templates")
    return value


def _text(token: Any) -> str | None:
    """The text of a token, which is stored by itself or with its settings."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None

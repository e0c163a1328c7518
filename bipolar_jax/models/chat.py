"""Conventions of a model's texts: its chat template, and the names of tokens that end a text."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from bipolar_jax.extras import require
from bipolar_jax.models.config import TransformerConfig

if TYPE_CHECKING:  # optional dependency
    import tokenizers

Message = Mapping[str, Any]

# Tokens that end a text or a turn in published models, by name; llama.cpp ends texts at the same ones.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot|>",
    "<EOT>",
    "_<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with wide bars
    "<end_of_utterance>",
    "<EOS>",
    "<eos>",
    "</s>",
)


def with_end_tokens(config: TransformerConfig, tokenizer: tokenizers.Tokenizer) -> TransformerConfig:
    """The config, with the ids of END_TOKENS in the vocabulary as `eos_ids` if it names none."""
    if config.eos_ids:
        return config
    found = (tokenizer.token_to_id(name) for name in END_TOKENS)
    return dataclasses.replace(
        config, eos_ids=tuple(token for token in found if token is not None and token < config.vocab_size)
    )


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a model was trained to read a conversation.

    Attributes:
      source: Jinja template, as in tokenizer_config.json; it decides which roles there are.
      special_tokens: texts of the tokens that the template may name, such as "bos_token".
    """

    source: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: Any) -> ChatTemplate:
        """The template that `dataclasses.asdict` describes. Raises ValueError for anything else."""
        if not isinstance(fields, dict) or not isinstance(fields.get("source"), str):
            raise ValueError(f"a chat template is {fields!r:.60}, expected an object with its source")
        tokens = fields.get("special_tokens")
        if not isinstance(tokens, dict) or not all(isinstance(text, str) for text in tokens.values()):
            raise ValueError(f"a chat template's special tokens are {tokens!r:.60}, expected texts by name")
        return cls(fields["source"], tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, special tokens included; the variables are those that transformers gives.

        The template is untrusted: it runs in Jinja's sandbox, and cannot change the messages.

        Args:
          messages: dicts with "role" and "content", and what else the template reads.
          add_generation_prompt: whether the text ends with the beginning of the assistant's turn.
          **variables: further variables of the template, such as `tools`.

        Raises:
          ValueError: the template fails, or refuses the messages; the message says why.
          ModuleNotFoundError: the extra "models" is not installed.
        """
        jinja2 = require("jinja2", "models")
        require("jinja2.sandbox", "models")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        known = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return environment.from_string(self.source).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **known
            )
        except Exception as error:  # a template may raise whatever Python's operators raise
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """JSON as transformers writes it: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

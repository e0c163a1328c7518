"""A model with its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bipolar_jax.models.chat import ChatTemplate, Message
from bipolar_jax.models.tokenizer_json import encode
from bipolar_jax.models.transformer import Transformer

if TYPE_CHECKING:  # optional dependency
    import tokenizers


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model and the tokenizer that it was trained with.

    Attributes:
      model: the Transformer; `model.config` has the shapes and the BOS and EOS ids.
      tokenizer: converts text to ids and back; its ids are below `model.config.vocab_size`.
      chat_template: how the model reads a conversation; None for models that were not trained on any.
    """

    model: Transformer
    tokenizer: tokenizers.Tokenizer
    chat_template: ChatTemplate | None = None

    def with_model(self, model: Transformer) -> PretrainedModel:
        """The same tokenizer and template around another model, such as the quantized one."""
        return dataclasses.replace(self, model=model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds; never with a second BOS token.

        Raises:
          ValueError: the text is not valid Unicode.
        """
        _check_unicode(text)
        ids = encode(self.tokenizer, text)
        bos = self.model.config.bos_id
        while ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, up to the beginning of the assistant's next turn.

        Args:
          messages: dicts with "role" and "content"; the model's template decides which roles there are.
          **variables: see `ChatTemplate.render`.

        Raises:
          ValueError: the model has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template: give a text as the prompt, or set chat_template")
        text = self.chat_template.render(messages, **variables)
        _check_unicode(text)
        return encode(self.tokenizer, text, add_special_tokens=False)  # the template writes them


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode ({error}): was it read from bytes of another encoding?"
        ) from error

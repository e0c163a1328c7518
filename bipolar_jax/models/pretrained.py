"""A model with its tokenizer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bipolar_jax.models.transformer import Transformer

if TYPE_CHECKING:  # optional dependency
    import tokenizers


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model and the tokenizer that it was trained with.

    Attributes:
      model: the Transformer; `model.config` has the shapes and the BOS and EOS ids.
      tokenizer: converts text to ids and back; its ids are below `model.config.vocab_size`.
    """

    model: Transformer
    tokenizer: tokenizers.Tokenizer

"""A model and the tokenizer it was trained with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bipolar_jax.models.transformer import Transformer

if TYPE_CHECKING:  # an optional dependency: whoever has a PretrainedModel has it
    import tokenizers


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """What a checkpoint holds.

    Attributes:
      model: the Transformer; `model.config` has the shapes and the BOS and EOS ids.
      tokenizer: text to ids and back. It has at most `model.config.vocab_size` ids.
    """

    model: Transformer
    tokenizer: tokenizers.Tokenizer

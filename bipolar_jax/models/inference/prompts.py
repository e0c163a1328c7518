"""Prompts, as users give them, to padded token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from bipolar_jax.models.chat import Message
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer, check_ids

# A text, a conversation, or token ids.
Prompt = str | Sequence[Message] | Sequence[int]

# Prompt lengths and cache capacities are rounded up to a multiple of this, so that prompts of similar lengths share one
# compilation.
_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Token ids of all prompts.

    Attributes:
      ids: of each prompt.
      are_texts: whether texts or conversations were given, and texts are expected back.
      is_one: whether one prompt was given by itself, outside a list.
    """

    ids: list[Sequence[int]]
    are_texts: bool
    is_one: bool


def encode_prompts(source: Transformer | PretrainedModel, prompts: Prompt | Sequence[Prompt]) -> EncodedPrompts:
    """Encodes texts and conversations with the model's tokenizer, and takes ids as they are.

    Raises:
      ValueError: texts without a tokenizer, texts among ids, or none of these.
    """
    is_one = isinstance(prompts, str) or _is_chat(prompts)
    prompts = [prompts] if is_one else prompts
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__array__"):
        raise ValueError(f"prompts must be a text, a conversation (a list of messages) or a list, got {prompts!r:.60}")
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one")
    are_texts = [isinstance(prompt, str) or _is_chat(prompt) for prompt in prompts]
    if not any(are_texts) and all(np.ndim(prompt) == 1 for prompt in prompts):
        return EncodedPrompts(list(prompts), False, False)
    if not all(are_texts):
        raise ValueError(
            "prompts must be a list of lists of token ids, or texts or conversations for a PretrainedModel, whose "
            "tokenizer encodes them"
        )
    if not isinstance(source, PretrainedModel):
        raise ValueError(
            "prompts are texts, and a Transformer has no tokenizer: pass the PretrainedModel, or encode them into "
            "lists of token ids"
        )
    ids = [source.encode(prompt) if isinstance(prompt, str) else source.encode_chat(prompt) for prompt in prompts]
    return EncodedPrompts(ids, True, is_one)


def _is_chat(prompt: Prompt) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and (isinstance(prompt[0], Mapping))
    )


def pad_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, " batch"], int]:
    """Ids padded on the right, the length of each prompt, and the capacity of the cache.

    Raises:
      ValueError: an empty prompt, ids outside the vocabulary, or prompt and new tokens together longer than the
        model's context.
    """
    config = model.config
    is_integer = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
    if not is_integer or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r:.40}")
    max_new_tokens = int(max_new_tokens)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError(f"prompt {int(np.argmin(lengths))} is empty: give at least one token, such as the BOS token")
    longest = int(lengths.max())
    if longest + max_new_tokens > config.context_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{config.context_length}: shorten the prompt or ask for fewer tokens"
        )
    for prompt in prompts:
        check_ids(prompt, config.vocab_size)
    ids = np.zeros((len(prompts), min(round_up_length(longest), config.context_length)), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    capacity = min(round_up_length(longest + max_new_tokens), max(config.context_length, ids.shape[1]))
    return ids, lengths, capacity


def round_up_length(length: int) -> int:
    """The length that prompts are padded to, and the capacity that caches have, for at least `length` positions."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP

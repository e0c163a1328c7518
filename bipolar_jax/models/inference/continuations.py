"""Log-likelihoods of given continuations: how benchmarks of multiple choice ask a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.models.inference.prompts import round_up_length
from bipolar_jax.models.transformer import Transformer, check_ids, check_transformer
from bipolar_jax.ops.explicit_sharding import set_axes_are_auto
from bipolar_jax.packing.host_memory import on_host


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
      logprob: sum of the natural logarithms of its tokens' probabilities.
      greedy: whether each of its tokens is the likeliest one.
      tokens: number of its tokens.
    """

    logprob: float
    greedy: bool
    tokens: int


def score_continuations(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    texts_per_step: int = 8,
    on_text: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Texts of similar lengths run together, padded on the right. Quantized activations round alike in any batch, because
    every token has its own scale.

    Args:
      model: a Transformer, or one that is cut over a mesh; `texts_per_step` then divides over its axis "data".
      pairs: token ids of a context, at least one, and of a continuation, which may be empty.
      texts_per_step: texts of a forward pass; more is faster and takes more memory.
      on_text: called with the number of texts scored so far.

    Raises:
      ValueError: an empty context, ids outside the vocabulary, a text longer than the model's context by more than its
        last token, or logits that are NaN.
    """
    check_transformer(model)
    if texts_per_step < 1:
        raise ValueError(f"needs at least 1 text a step, got {texts_per_step=}")
    config = model.config
    lengths = []
    for index, (context, continuation) in enumerate(pairs):
        if len(context) == 0:
            raise ValueError(f"context {index} is empty: give at least one token, such as the BOS token")
        text = [*context, *continuation]
        check_ids(text, config.vocab_size)
        if len(text) - 1 > config.context_length:
            raise ValueError(
                f"text {index} has {len(text)} tokens, the model reads {config.context_length}: shorten its context"
            )
        lengths.append(len(text))
    scored: dict[int, Likelihood] = {}
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    for start in range(0, len(order), texts_per_step):
        chosen = order[start : start + texts_per_step]
        length = min(round_up_length(max(lengths[chosen[0]] - 1, 1)), config.context_length)
        ids = np.zeros((texts_per_step, length + 1), np.int32)
        asked = np.zeros((texts_per_step, length), bool)
        for row, index in enumerate(chosen):
            context, continuation = pairs[index]
            ids[row, : lengths[index]] = [*context, *continuation]
            asked[row, len(context) - 1 : lengths[index] - 1] = True
        with set_axes_are_auto():
            found = zip(*map(on_host, _likelihoods(model, ids, asked)), strict=True)
        for index, (logprob, greedy) in zip(chosen, found, strict=False):
            if np.isnan(logprob):
                raise ValueError(f"the likelihood of text {index} is NaN: the weights are damaged")
            scored[index] = Likelihood(float(logprob), bool(greedy), len(pairs[index][1]))
        if on_text is not None:
            on_text(len(scored))
    return [scored[index] for index in range(len(pairs))]


@jax.jit
def _likelihoods(
    model: Transformer, ids: Int[Array, "texts length_1"], asked: Bool[Array, "texts length"]
) -> tuple[Float[Array, " texts"], Bool[Array, " texts"]]:
    """Sums over the positions that are asked for, each of which predicts the next token."""
    hidden = model.hidden_states(ids[:, :-1])

    def one_text(text):  # the logits, the largest array by far, of one text at a time
        hidden, following, asked = text
        logits = model.logits(hidden)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), following[:, None], axis=-1)[:, 0]
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32) == following
        return jnp.sum(jnp.where(asked, logprobs, 0)), jnp.all(greedy | ~asked)

    return jax.lax.map(one_text, (hidden, ids[:, 1:], asked))

"""Perplexity of a model, on windows of a text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from bipolar_jax.models.transformer import Transformer, check_ids, check_transformer
from bipolar_jax.nn.compressible import with_signs, without_signs
from bipolar_jax.ops.explicit_sharding import set_axes_are_auto
from bipolar_jax.packing.host_memory import on_host


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token.

    Attributes:
      perplexity: over all predicted tokens.
      standard_error: of the perplexity, from the spread of the windows' means; NaN for one window.
      windows: number of windows.
      scored_tokens: number of predicted tokens, which are all but the first of every window.
      window_losses: mean negative log-likelihood of each window's tokens, in nats.
    """

    perplexity: float
    standard_error: float
    windows: int
    scored_tokens: int
    window_losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """How much more a model loses than another on the same windows.

    Windows differ far more than models: the standard error of the difference is that of the windows' own differences.

    Attributes:
      loss: mean difference of the windows' losses, in nats a token.
      standard_error: of `loss`; NaN for one window.
      relative_perplexity: the ratio of the perplexities, exp(loss): 1.02 is 2% more.
    """

    loss: float
    standard_error: float
    relative_perplexity: float


def paired_difference(scored: Perplexity, against: Perplexity) -> PairedDifference:
    """The difference of two models that were scored on the same windows of the same text.

    Raises:
      ValueError: other numbers of windows or tokens.
    """
    if (scored.windows, scored.scored_tokens) != (against.windows, against.scored_tokens):
        raise ValueError(
            f"{scored.windows} windows of {scored.scored_tokens} tokens cannot be paired with {against.windows} of "
            f"{against.scored_tokens}: score both models on the same windows"
        )
    differences = np.asarray(scored.window_losses) - np.asarray(against.window_losses)
    with np.errstate(over="ignore"):
        ratio = float(np.exp(differences.mean()))
    return PairedDifference(float(differences.mean()), _standard_error(differences), ratio)


def perplexity(
    model: Transformer,
    ids: Sequence[int],
    *,
    windows: int,
    window_length: int = 512,
    windows_per_step: int = 4,
    cache_bits: int | None = None,
    on_window: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity on the first windows of a text.

    Window i is ids[window_length * i : window_length * (i + 1)]. Every token of it but the first is predicted from
    those before it in the window.

    Args:
      model: a Transformer, or one that is cut over a mesh.
      ids: the whole text's token ids.
      windows: number of windows to score.
      window_length: tokens of a window, at least 2.
      windows_per_step: windows of a forward pass; more is faster and takes more memory.
      cache_bits: every token attends to keys and values as a cache of 8 or 4 bits keeps them; None leaves them.
      on_window: called with the number of windows scored so far.

    Raises:
      ValueError: the text is too short, a window longer than the model's context, ids
        outside the vocabulary, or logits that are NaN.
    """
    check_transformer(model)
    if windows < 1 or window_length < 2 or windows_per_step < 1:
        raise ValueError(
            f"needs at least 1 window of 2 tokens and 1 window a step, got {windows=}, {window_length=}, "
            f"{windows_per_step=}"
        )
    if window_length > model.config.context_length:
        raise ValueError(f"{window_length=} exceeds the model's context of {model.config.context_length}")
    if len(ids) < windows * window_length:
        raise ValueError(
            f"the text has {len(ids)} tokens, {windows} windows of {window_length} need {windows * window_length}: "
            f"ask for at most {len(ids) // window_length}, or give a longer text"
        )
    used = ids[: windows * window_length]
    check_ids(used, model.config.vocab_size)
    used = np.asarray(used, np.int32).reshape(windows, window_length)
    losses, (model, signs) = [], without_signs(model)
    for start in range(0, windows, windows_per_step):
        batch = used[start : start + windows_per_step]
        losses.extend(_losses_of(model, signs, batch, cache_bits))
        if on_window is not None:
            on_window(len(losses))
    means = np.asarray(losses)
    if not np.isfinite(means).all():
        raise ValueError(f"the loss of window {int(np.argmin(np.isfinite(means)))} is not finite: the model gives NaN")
    with np.errstate(over="ignore"):  # above 709 nats a token it is inf
        value = float(np.exp(means.mean()))
    error = value * _standard_error(means)
    return Perplexity(value, error, windows, windows * (window_length - 1), tuple(means.tolist()))


def _losses_of(
    model: Transformer,
    signs: Int8[np.ndarray, " hidden"] | None,
    batch: Int[np.ndarray, "windows length"],
    cache_bits: int | None,
) -> Float[np.ndarray, " windows"]:
    """`_window_losses` on the host; the texts of a mesh are filled up until they divide over it."""
    parts = model.plan.data if hasattr(model, "plan") else 1
    filled = np.concatenate([batch, np.repeat(batch[:1], -len(batch) % parts, axis=0)])
    with set_axes_are_auto():
        return on_host(_window_losses(model, signs, filled, cache_bits))[: len(batch)].astype(np.float64)


def _standard_error(samples: Float[np.ndarray, " windows"]) -> float:
    """Of the mean of the samples; NaN for one."""
    return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan


@functools.partial(jax.jit, static_argnames="cache_bits")
def _window_losses(
    model: Transformer,
    signs: Int8[Array, " hidden"] | None,
    ids: Int[Array, "windows length"],
    cache_bits: int | None = None,
) -> Float[Array, " windows"]:
    """Mean negative log-likelihood of every window, in nats; `signs` are those of `without_signs`."""
    model = with_signs(model, signs)
    hidden = model.hidden_states(ids, cache_bits)

    def one_window(window):  # the logits, the largest array by far, of one window at a time
        hidden, ids = window
        log_probabilities = jax.nn.log_softmax(model.logits(hidden[:-1]), axis=-1)
        return -jnp.mean(jnp.take_along_axis(log_probabilities, ids[1:, None], axis=-1))

    return jax.lax.map(one_window, (hidden, ids))

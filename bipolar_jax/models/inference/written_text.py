"""Text that a model writes by itself: data for calibration and distillation when there is no other.

Each window is a random token that the model continues at temperature 1, so that windows are samples of what it has
learned (LLM-QAT, Liu et al. 2023, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from bipolar_jax.models.inference.decode_loop import CHUNK, NOT_FINITE, Choice, Settings, first_token, next_tokens
from bipolar_jax.models.inference.prompts import round_up_length
from bipolar_jax.models.inference.sampling import Sampling, one_key
from bipolar_jax.models.transformer import Transformer, check_ids, check_transformer

_CHOICE = Choice(greedy=False, penalizes=False, logprobs=False)


def write_windows(
    model: Transformer,
    windows: int,
    length: int = 512,
    *,
    key: PRNGKeyArray,
    first_id: int | None = None,
    windows_per_step: int = 32,
    on_window: Callable[[float], None] | None = None,
) -> Int[np.ndarray, "windows length"]:
    """Windows of text that the model writes; tokens that end a text do not end a window.

    One key, model and `windows_per_step` give the same windows on one device. More windows begin with the same ones:
    step i of `windows_per_step` draws with `fold_in(key, i)`, and the last step is cut.

    Args:
      model: the model, as a rule the float one; `prepare_for_inference` makes it fast on GPUs.
      windows: number of windows.
      length: tokens of a window, the first one included.
      key: PRNG key of either kind.
      first_id: first token of every window; None draws one for each, of all ids but `config.bos_id` and `eos_ids`.
      windows_per_step: windows that are written at the same time; each takes the memory of its keys and values.
      on_window: called with the number of windows written so far, which grows in fractions.

    Returns:
      Token ids, int32.

    Raises:
      ValueError: counts below 1, windows longer than the model's context, a first id outside the vocabulary, or logits
        that are NaN or infinite.
    """
    check_transformer(model)
    config, key = model.config, one_key(key)
    if windows < 1 or length < 1 or windows_per_step < 1:
        raise ValueError(
            f"needs at least 1 window of 1 token and 1 window a step, got {windows=}, {length=}, {windows_per_step=}"
        )
    if length > config.context_length:
        raise ValueError(f"windows of {length} tokens exceed the model's context of {config.context_length}")
    if first_id is not None:
        check_ids([first_id], config.vocab_size)
    batch = min(windows_per_step, windows)
    written = np.zeros((-(-windows // batch) * batch, length), np.int32)
    for step, start in enumerate(range(0, windows, batch)):
        begin, rest = jax.random.split(jax.random.fold_in(key, step))
        first = _first_ids(model, batch, begin) if first_id is None else jnp.full(batch, first_id, jnp.int32)
        written[start : start + batch, 0] = np.asarray(first)
        for column, tokens in _continuations(model, first, length, rest):
            written[start : start + batch, column : column + len(tokens)] = tokens.T
            if on_window is not None:
                share = batch * (column + len(tokens)) / length
                on_window(min(start + share, windows))
    return written[:windows]


def _first_ids(model: Transformer, batch: int, key: PRNGKeyArray) -> Int[Array, " batch"]:
    """Random ids but those that begin or end a text, as far as the vocabulary has others."""
    excluded = {model.config.bos_id, *model.config.eos_ids}
    allowed = np.setdiff1d(np.arange(model.config.vocab_size), [token for token in excluded if token is not None])
    allowed = allowed if len(allowed) else np.arange(model.config.vocab_size)
    return jax.random.choice(key, jnp.asarray(allowed, jnp.int32), (batch,))


def _continuations(model: Transformer, first: Int[Array, " batch"], length: int, key: PRNGKeyArray):
    """Yields the column of a chunk of new tokens, and the tokens: int32 [steps, batch]."""
    if length == 1:
        return
    batch = first.shape[0]
    settings = Settings(Sampling(temperature=1.0).values(), key, np.zeros(0, np.int32))
    running = np.ones(batch, bool)
    # A prompt of one token is not padded: in so many windows the padding would cost an eighth of the time.
    capacity = min(round_up_length(length), model.config.context_length)
    state = first_token(model, first[:, None], running.astype(np.int32), capacity, None, _CHOICE, settings)
    tokens, column = np.asarray(state.tokens)[None], 1
    while True:
        if (tokens == NOT_FINITE).any():
            raise ValueError(
                f"the logits of token {column + int(np.argmax((tokens == NOT_FINITE).any(axis=1)))} of a window are "
                "NaN or infinite: the weights are damaged, or the dtype's range is too small for this model"
            )
        yield column, tokens
        column += len(tokens)
        if column >= length:
            return
        limit = min(CHUNK, length - column)
        chunk, state = next_tokens(model, state, _CHOICE, settings, running, np.int32(limit))
        tokens = np.asarray(chunk.tokens)[:limit]

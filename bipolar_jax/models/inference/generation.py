"""Generation: from prompts to new tokens, streamed one by one, or all in one loop on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from bipolar_jax.models.inference.sampling import Sampling, sample
from bipolar_jax.models.kv_cache.quantized_heads import check_cache_bits
from bipolar_jax.models.transformer import Transformer, check_ids

# Prompt lengths and cache capacities are rounded up to a multiple of this, so that prompts of similar lengths share one
# compilation.
_LENGTH_STEP = 64


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    key: PRNGKeyArray | None = None,
    cache_bits: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every prompt until all texts have ended.

    The call itself checks the arguments, before the first token is requested.

    Args:
      model: the model; its config says which tokens end a text.
      prompts: token ids, of any lengths; with greedy sampling each is continued as if it were alone.
      max_new_tokens: limit of new tokens for each prompt.
      sampling: how to choose.
      key: PRNG key, needed if `sampling` draws at random.
      cache_bits: bits of the cached keys and values, 8 or 4; None keeps the model's dtype.

    Yields:
      int32 [batch] ids; -1 for a text that has ended. The token that ends a text is yielded.

    Raises:
      ValueError: no prompts, an empty one, ids outside the vocabulary, prompt and new
        tokens together longer than the model's context, or other cache_bits.
    """
    return _steps(model, *_prepared(model, prompts, max_new_tokens, sampling, key, cache_bits), sampling, cache_bits)


def _steps(model, ids, lengths, keys, capacity, sampling, cache_bits) -> Iterator[np.ndarray]:
    eos = np.asarray(model.config.eos_ids, np.int32)
    tokens, cache = _first_token(model, ids, lengths, capacity, sampling, cache_bits, keys[0])
    running = np.ones(len(lengths), bool)
    for step in range(len(keys)):
        written = np.asarray(tokens)
        yield np.where(running, written, -1)
        running &= ~np.isin(written, eos)
        if not running.any() or step + 1 == len(keys):
            return
        tokens, cache = _next_token(model, tokens, cache, sampling, keys[step + 1])


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    key: PRNGKeyArray | None = None,
    cache_bits: int | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, including the one that ends the text: all that `stream` yields.

    The loop over tokens runs on the device, and ends when all texts have ended.
    """
    ids, lengths, keys, capacity = _prepared(model, prompts, max_new_tokens, sampling, key, cache_bits)
    tokens, cache = _first_token(model, ids, lengths, capacity, sampling, cache_bits, keys[0])
    steps, _ = _all_tokens(
        model, tokens, cache, sampling, jnp.resize(keys, round_up_length(max_new_tokens)), max_new_tokens
    )
    return [[int(token) for token in column if token >= 0] for column in np.asarray(steps).T]


def _first(model, ids, lengths, capacity, sampling, cache_bits, key):
    logits, cache = model.prefill(ids, lengths, capacity, cache_bits)
    return sample(logits, sampling, key), cache


def _next(model, tokens, cache, sampling, key):
    logits, cache = model.decode(tokens, cache)
    return sample(logits, sampling, key), cache


def _all(model, tokens, cache, sampling, keys, max_new_tokens):
    """Tokens of every step, the first included, with -1 where a text has ended; and the cache."""
    eos = jnp.asarray(model.config.eos_ids, jnp.int32)

    def unfinished(state):
        step, _, running, _, _ = state
        return (step < max_new_tokens) & jnp.any(running)

    def write_next(state):
        step, tokens, running, written, cache = state
        tokens, cache = _next(model, tokens, cache, sampling, keys[step])
        written = written.at[step].set(jnp.where(running, tokens, -1))
        return step + 1, tokens, running & ~jnp.isin(tokens, eos), written, cache

    written = jnp.full((len(keys), len(tokens)), -1, jnp.int32).at[0].set(tokens)
    state = 1, tokens, ~jnp.isin(tokens, eos), written, cache
    *_, written, cache = jax.lax.while_loop(unfinished, write_next, state)
    return written, cache


_first_token = jax.jit(_first, static_argnums=(3, 4, 5))
# The cache is donated, so that every step writes its position in place.
_next_token = jax.jit(_next, static_argnums=3, donate_argnums=2)
_all_tokens = jax.jit(_all, static_argnums=3, donate_argnums=2)


def _prepared(model, prompts, max_new_tokens, sampling, key, cache_bits):
    """Padded ids, their lengths, a key for each step, and the capacity of the cache."""
    ids, lengths = _padded(model, prompts, max_new_tokens)
    check_cache_bits(cache_bits, model.config.head_dim)
    if key is None:
        sample(jnp.zeros((1, 1)), sampling)  # raises unless it is greedy
        key = jax.random.key(0)
    capacity = min(round_up_length(int(lengths.max()) + max_new_tokens), max(model.config.context_length, ids.shape[1]))
    return jnp.asarray(ids), jnp.asarray(lengths), jax.random.split(key, max_new_tokens), capacity


def _padded(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, " batch"]]:
    config = model.config
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one")
    if isinstance(prompts, str) or any(np.ndim(prompt) != 1 for prompt in prompts):
        raise ValueError("prompts must be a list of lists of token ids: encode texts with the tokenizer")
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
    return ids, lengths


def round_up_length(length: int) -> int:
    """The length that prompts are padded to, and the capacity that caches have, for at least `length` positions."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP

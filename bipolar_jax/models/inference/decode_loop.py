"""The compiled programs of generation: a prompt's pass, and a chunk of new tokens in one loop on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bipolar_jax.models.inference.sampling import SamplingValues, draw, likeliest, log_probabilities, penalized
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.ops.compiled import compile_together, described, on_one_device

# Most tokens that the device computes between two looks of the host, which sees Ctrl-C and stop strings there.
CHUNK = 16
# In place of a token: the text has ended; its logits were NaN or infinite.
ENDED, NOT_FINITE = -1, -2


class Choice(NamedTuple):
    """What decides the structure of the programs; the settings' values are operands.

    Attributes:
      greedy: takes the likeliest token.
      penalizes: keeps the tokens of each text, for the repetition penalty.
      logprobs: computes the log-probability of each new token.
    """

    greedy: bool
    penalizes: bool
    logprobs: bool


class Settings(NamedTuple):
    """Operands of the programs that stay the same from step to step.

    Attributes:
      values: sampling settings.
      key: PRNG key; step i uses `fold_in(key, i)`.
      end_ids: ids that end a text, padded with `ENDED`.
    """

    values: SamplingValues
    key: PRNGKeyArray
    end_ids: Int[Array, " ends"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Texts between two steps.

    Attributes:
      tokens: the newest token of each text, which the cache does not have yet.
      logprobs: its log-probability; zeros where none are asked for.
      running: whether the text goes on after it.
      step: new tokens so far.
      seen: the tokens of each text, prompt included; None without a repetition penalty.
      cache: keys and values.
    """

    tokens: Int[Array, " batch"]
    logprobs: Float[Array, " batch"]
    running: Bool[Array, " batch"]
    step: Int[Array, ""]
    seen: Bool[Array, "batch vocab"] | None
    cache: KVCache


class Chunk(NamedTuple):
    """New tokens of some steps, `ENDED` in texts that had ended and in steps that were not computed."""

    tokens: Int[Array, "steps batch"]
    logprobs: Float[Array, "steps batch"]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def first_token(
    model: Transformer,
    ids: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    capacity: int,
    cache_bits: int | None,
    choice: Choice,
    settings: Settings,
) -> State:
    """Reads prompts that are padded on the right, and chooses the first new token of each."""
    logits, cache = model.prefill(ids, lengths, capacity, cache_bits)
    batch, vocab_size = logits.shape
    seen = None
    if choice.penalizes:
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        is_prompt = jnp.arange(ids.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        seen = jnp.zeros((batch, vocab_size), bool).at[rows, ids].max(is_prompt)
    running = jnp.ones(batch, bool)
    return _choose(logits, running, jnp.int32(0), seen, cache, choice, settings)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def next_tokens(
    model: Transformer,
    state: State,
    choice: Choice,
    settings: Settings,
    running: Bool[Array, " batch"],
    limit: Int[Array, ""],
) -> tuple[Chunk, State]:
    """Up to `limit` more tokens, at most CHUNK, until all texts have ended.

    Args:
      model: the model.
      state: the texts; donated, so that every step writes to the cache in place.
      choice: structure of the program.
      settings: its operands.
      running: texts that the host has not ended, for example at a stop string.
      limit: number of steps.
    """
    batch = state.tokens.shape[0]
    chunk = Chunk(jnp.full((CHUNK, batch), ENDED, jnp.int32), jnp.zeros((CHUNK, batch), jnp.float32))
    state = dataclasses.replace(state, running=state.running & running)
    first = state.step

    def goes_on(carry):
        state, _ = carry
        return (state.step - first < limit) & jnp.any(state.running) & ~jnp.any(state.tokens == NOT_FINITE)

    def write_next(carry):
        state, chunk = carry
        logits, cache = model.decode(jnp.maximum(state.tokens, 0), state.cache)
        index, running = state.step - first, state.running
        state = _choose(logits, running, state.step, state.seen, cache, choice, settings)
        tokens = jnp.where(running, state.tokens, ENDED)
        return state, Chunk(chunk.tokens.at[index].set(tokens), chunk.logprobs.at[index].set(state.logprobs))

    state, chunk = jax.lax.while_loop(goes_on, write_next, (state, chunk))
    return chunk, state


def compile_both(
    model: Transformer,
    ids: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    capacity: int,
    cache_bits: int | None,
    choice: Choice,
    settings: Settings,
) -> None:
    """Compiles `first_token` and `next_tokens` at the same time; calls of these shapes then find their programs.

    Called again with the same shapes it does nothing. Arrays that several devices share are left to the calls: how such
    a state is cut is known only when the first program has been compiled.

    Args:
      model, ids, lengths, capacity, cache_bits, choice, settings: as of `first_token`.

    Raises:
      Whatever the calls would raise when they are traced or compiled.
    """
    leaves, structure = jax.tree.flatten((model, ids, lengths, settings))
    if on_one_device(leaves):
        _compile_both(structure, tuple(map(described, leaves)), (capacity, cache_bits, choice))


@functools.lru_cache(maxsize=64)
def _compile_both(structure: Any, operands: tuple[jax.ShapeDtypeStruct, ...], static: tuple) -> None:
    model, ids, lengths, settings = structure.unflatten(operands)
    sharding = next((operand.sharding for operand in operands if operand.sharding is not None), None)

    def programs() -> Iterator[jax.stages.Lowered]:
        # The decode step is what compiles longest: it is under way while the prompt is still being lowered.
        first = first_token.trace(model, ids, lengths, *static, settings)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), first.out_info)
        running, limit = jax.ShapeDtypeStruct(lengths.shape, bool), jax.ShapeDtypeStruct((), jnp.int32)
        yield next_tokens.lower(model, state, static[-1], settings, running, limit)
        yield first.lower()

    compile_together(programs())


def _choose(
    logits: Float[Array, "batch vocab"],
    running: Bool[Array, " batch"],
    step: Int[Array, ""],
    seen: Bool[Array, "batch vocab"] | None,
    cache: KVCache,
    choice: Choice,
    settings: Settings,
) -> State:
    """The texts with one more token; a running text whose logits are not finite gets NOT_FINITE."""
    scores = penalized(logits, seen, settings.values) if choice.penalizes else logits
    if choice.greedy:
        tokens = likeliest(scores)
    else:
        tokens = draw(scores, settings.values, jax.random.fold_in(settings.key, step))
    if choice.penalizes:
        seen = seen.at[jnp.arange(len(tokens), dtype=jnp.int32), tokens].set(True)
    logprobs = log_probabilities(logits, tokens) if choice.logprobs else jnp.zeros(tokens.shape, jnp.float32)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    tokens = jnp.where(running & ~finite, NOT_FINITE, tokens)
    ends = jnp.any(tokens[:, None] == settings.end_ids[None], axis=-1)
    return State(tokens, logprobs, running & ~ends, step + 1, seen, cache)

"""Generation: from prompts to new tokens, streamed one by one, or in chunks that the device computes by itself."""

from __future__ import annotations

import dataclasses
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, PRNGKeyArray

from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.inference.decode_loop import (
    CHUNK,
    ENDED,
    NOT_FINITE,
    Choice,
    Settings,
    compile_both,
    first_token,
    next_tokens,
)
from bipolar_jax.models.inference.prompts import EncodedPrompts, Prompt, encode_prompts, pad_prompts
from bipolar_jax.models.inference.sampling import Sampling, one_key
from bipolar_jax.models.inference.text_stream import TextStream
from bipolar_jax.models.kv_cache.quantized_heads import check_cache_bits
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer, check_ids, check_transformer
from bipolar_jax.ops.explicit_sharding import set_axes_are_auto
from bipolar_jax.packing.host_memory import on_host

# Sizes of the array of end ids are rounded up to a multiple of this: other end ids share a compilation.
_END_IDS_STEP = 8


@dataclasses.dataclass(frozen=True)
class Completion:
    """What follows one prompt.

    Attributes:
      tokens: new token ids, including the one that ended the text.
      logprobs: natural logarithm of the model's probability of each, before any setting of `Sampling` changes it.
      text: their text without special tokens and stop string, for a prompt that is a text or with stop strings.
      finish: why it ended: "end" (an end token), "stop" (a stop string) or "length" (max_new_tokens).
    """

    tokens: list[int]
    logprobs: list[float]
    text: str | None
    finish: str


def generate(
    model: Transformer | PretrainedModel,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    key: PRNGKeyArray | None = None,
    cache_bits: int | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    logprobs: bool = False,
) -> Any:
    """The new tokens, or the new text, of every prompt.

    The device computes up to 16 tokens by itself. Between these chunks the host looks for Ctrl-C and stop strings.

    Args:
      model: the model, or for texts the PretrainedModel; `prepare_for_inference` makes either fast.
      prompts: a text, or a conversation (dicts with "role" and "content") for the model's chat template; or a list of
        them, or of lists of token ids, of any lengths. With greedy sampling each is continued as if it were alone, but
        for rounding: quantized activations of a batch may round to other steps, and so change a token of small margin.
      max_new_tokens: limit of new tokens for each prompt.
      sampling: how to choose. All values of its fields share a compilation.
      key: PRNG key of either kind; without one each call draws anew.
      cache_bits: bits of the cached keys and values, 8 or 4; None keeps the model's dtype.
      temperature, top_k, top_p, repetition_penalty: replace fields of `sampling`.
      stop: strings that end a text, which ends before them; needs a PretrainedModel.
      end_ids: ids that end a text; None takes the model's `config.eos_ids`, and () goes on to the limit.
      logprobs: whether to return `Completion`s, which have the log-probability of each token.

    Returns:
      For ids a list of lists of ids, each with the token that ended it; for texts and conversations a list of texts, or
      one text for a prompt outside a list. With `logprobs`, `Completion`s instead of each.

    Raises:
      ValueError: no Transformer, no prompts, an empty one, ids outside the vocabulary, prompt and new tokens together
        longer than the model's context, settings of another type or out of range, other cache_bits, or logits that are
        NaN or infinite: the message names the step, counted from 0.
    """
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    run = _prepared(
        model, prompts, max_new_tokens, _replaced(sampling, fields), key, cache_bits, stop, end_ids, logprobs
    )
    texts = [_Text(run, prompt) for prompt in run.prompts.ids]
    running = np.ones(len(texts), bool)
    for tokens, probabilities in _steps(run, CHUNK, running):
        for row, text in enumerate(texts):
            if tokens[row] != ENDED and text.finish is None:
                text.add(int(tokens[row]), float(probabilities[row]))
                running[row] &= text.finish is None
    results = [text.completion() if logprobs else text.result() for text in texts]
    return results[0] if run.prompts.is_one else results


def stream(
    model: Transformer | PretrainedModel,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    key: PRNGKeyArray | None = None,
    cache_bits: int | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    logprobs: bool = False,
) -> Iterator[Any]:
    """Yields the next token, or the next text, of every prompt until all have ended.

    The call itself checks the arguments, before the first token is requested. Arguments and errors are those of
    `generate`, whose tokens and texts it yields.

    Yields:
      For ids int32 [batch]; -1 for a text that has ended. The token that ends a text is yielded. For texts and
      conversations a list of texts, or one text for a prompt outside a list: "" while the token only begins a character
      or may begin a stop string. With `logprobs` pairs of these and the tokens' log-probabilities: float32 [batch], NaN
      for a text that has ended, or one float for one text.
    """
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    run = _prepared(
        model, prompts, max_new_tokens, _replaced(sampling, fields), key, cache_bits, stop, end_ids, logprobs
    )
    return _streamed(run, logprobs)


def _streamed(run: _Run, logprobs: bool) -> Iterator[Any]:
    texts = [_Text(run, prompt) for prompt in run.prompts.ids]
    running = np.ones(len(texts), bool)
    written = [0] * len(texts)
    for tokens, probabilities in _steps(run, 1, running):
        new = []
        for row, text in enumerate(texts):
            if tokens[row] != ENDED:
                text.add(int(tokens[row]), float(probabilities[row]))
                running[row] &= text.finish is None
            new.append(text.text[written[row] :])
            written[row] = len(text.text)
        found = new if run.prompts.are_texts else tokens
        found_logprobs = np.where(tokens == ENDED, np.float32(np.nan), probabilities)
        if run.prompts.is_one:
            found, found_logprobs = found[0], float(found_logprobs[0])
        yield (found, found_logprobs) if logprobs else found


@dataclasses.dataclass(frozen=True)
class _Run:
    """The checked arguments of a call, ready for the device."""

    model: Transformer
    tokenizer: Any
    prompts: EncodedPrompts
    ids: Int[np.ndarray, "batch length"]
    lengths: Int[np.ndarray, " batch"]
    capacity: int
    max_new_tokens: int
    cache_bits: int | None
    choice: Choice
    settings: Settings
    end_ids: frozenset[int]
    stop: tuple[str, ...]


class _Text:
    """The text that follows one prompt."""

    def __init__(self, run: _Run, prompt: Sequence[int]):
        self._run = run
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: str | None = None
        self.text = ""
        needs_text = run.prompts.are_texts or run.stop
        self._decoder = TextStream(run.tokenizer, prompt, run.stop) if needs_text else None

    def add(self, token: int, logprob: float) -> None:
        """Appends a token; sets `finish` if the text ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._run.end_ids:
            self.finish = "end"
        elif self._decoder is not None:
            self.text += self._decoder.push(token)
        if self.finish is None and len(self.tokens) == self._run.max_new_tokens:
            self.finish = "length"
        if self._decoder is not None:
            if self.finish is not None:
                self.text += self._decoder.flush()
            if self._decoder.stopped:
                self.finish = "stop"

    def completion(self) -> Completion:
        text = None if self._decoder is None else self.text
        return Completion(self.tokens, self.logprobs, text, self.finish)

    def result(self) -> str | list[int]:
        return self.text if self._run.prompts.are_texts else self.tokens


def _steps(
    run: _Run, chunk: int, running: Bool[np.ndarray, " batch"]
) -> Iterator[tuple[Int[np.ndarray, " batch"], np.ndarray]]:
    """Tokens and log-probabilities of each step; `ENDED` for a text that has ended.

    Args:
      run: the call.
      chunk: most steps that the device computes at a time.
      running: which texts go on; this function and the caller clear entries.

    Raises:
      ValueError: the logits of a running text are not finite.
    """
    ends = np.asarray(sorted(run.end_ids), np.int32)
    prompts = run.model, run.ids, run.lengths, run.capacity, run.cache_bits, run.choice, run.settings
    with set_axes_are_auto():
        if run.max_new_tokens > 1:
            compile_both(*prompts)
        state = first_token(*prompts)
    # Read before the state is donated.
    chunks = deque([(on_host(state.tokens)[None], on_host(state.logprobs)[None], 1)])
    # While the host reads a chunk, a GPU computes the next; a CPU's are slow enough that Ctrl-C would wait for two.
    ahead = 1 if chunk == 1 or default_device().platform == "cpu" else 2
    asked, step = 1, 0
    while chunks:
        tokens, logprobs, computed = chunks.popleft()
        for row_tokens, row_logprobs in zip(on_host(tokens)[:computed], on_host(logprobs), strict=False):
            if not running.any():
                break
            row_tokens = np.where(running, row_tokens, ENDED)
            if (row_tokens == NOT_FINITE).any():
                _raise_not_finite(step, int(np.argmax(row_tokens == NOT_FINITE)))
            running &= ~np.isin(row_tokens, ends)
            step += 1
            yield row_tokens, row_logprobs
        while len(chunks) < ahead and asked < run.max_new_tokens and running.any():
            limit = min(chunk, run.max_new_tokens - asked)
            with set_axes_are_auto():
                found, state = next_tokens(run.model, state, run.choice, run.settings, running.copy(), np.int32(limit))
            chunks.append((found.tokens, found.logprobs, limit))
            asked += limit


def _raise_not_finite(step: int, prompt: int) -> None:
    raise ValueError(
        f"the logits at step {step} of prompt {prompt} are NaN or infinite: the weights are damaged, or the dtype's "
        "range is too small for this model"
    )


def _prepared(model, prompts, max_new_tokens, sampling, key, cache_bits, stop, end_ids, logprobs) -> _Run:
    """Checks all arguments of a call."""
    check_transformer(model.model if isinstance(model, PretrainedModel) else model)
    encoded = encode_prompts(model, prompts)
    tokenizer = model.tokenizer if isinstance(model, PretrainedModel) else None
    model = model.model if isinstance(model, PretrainedModel) else model
    ids, lengths, capacity = pad_prompts(model, encoded.ids, max_new_tokens)
    check_cache_bits(cache_bits, model.config.head_dim)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must be strings that are not empty, which every text contains, got {stop!r:.60}")
    if stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer: pass the PretrainedModel, or end_ids instead")
    if end_ids is None:
        end_ids = model.config.eos_ids
    elif np.size(end_ids):
        check_ids(end_ids, model.config.vocab_size)
    end_ids = frozenset(map(int, end_ids))
    padded_ends = np.full(-(-max(len(end_ids), 1) // _END_IDS_STEP) * _END_IDS_STEP, ENDED, np.int32)
    padded_ends[: len(end_ids)] = sorted(end_ids)
    return _Run(
        model,
        tokenizer,
        encoded,
        ids,
        lengths,
        capacity,
        int(max_new_tokens),
        cache_bits,
        Choice(sampling.greedy, sampling.penalizes, logprobs),
        Settings(sampling.values(), _key(key, sampling), padded_ends),
        end_ids,
        stop,
    )


def _replaced(sampling: Sampling, fields: dict[str, float | None]) -> Sampling:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, or leave it out and give temperature, got {sampling!r:.60}")
    return dataclasses.replace(sampling, **{name: value for name, value in fields.items() if value is not None})


def _key(key: PRNGKeyArray | None, sampling: Sampling) -> PRNGKeyArray:
    """A typed key: the one given, of either kind, or a random one where it matters."""
    if key is None:
        return jax.random.key(0 if sampling.greedy else secrets.randbits(31))
    return one_key(key)

"""A model of this package for lm-evaluation-harness (pip install 'bipolar_jax[eval]').

    lm_eval.simple_evaluate(model=HarnessModel(pretrained), tasks=["arc_easy"])

The harness downloads the data sets of its own tasks; tasks of local files need no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from bipolar_jax.models.inference.continuations import score_continuations
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import encode

from ..support.progress import progress_bar

# New tokens where a task does not say how many.
_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """The harness' three questions: likelihoods of continuations, of whole texts, and texts that are generated.

    Attributes:
      pretrained: model and tokenizer.
    """

    def __init__(self, pretrained: PretrainedModel, texts_per_step: int = 8):
        """Wraps a model; `texts_per_step` texts run at once."""
        super().__init__()
        self.pretrained = pretrained
        self._texts_per_step = texts_per_step

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a text; of models without one the first that begins one, or 0."""
        config = self.pretrained.model.config
        return next(iter((*config.eos_ids, *([] if config.bos_id is None else [config.bos_id]), 0)))

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self.pretrained.model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """Names nothing: the tokenizer is the checkpoint's own."""
        return "checkpoint"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with special tokens unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return encode(self.pretrained.tokenizer, string, add_special_tokens=False)
        return self.pretrained.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities, and whether greedy decoding writes the continuation; long contexts lose their
        beginning."""
        pairs = []
        for _text, context, continuation in requests:
            continuation = continuation[-self.max_length :]
            pairs.append((context[-(self.max_length + 1 - len(continuation)) :], continuation))
        with progress_bar("scoring continuations", len(pairs)) as advance:
            scored = score_continuations(
                self.pretrained.model, pairs, texts_per_step=self._texts_per_step, on_text=advance
            )
        answers = [(each.logprob, each.greedy) for each in scored]
        for (text, *_ids), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap; each begins with the last token before it."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            for start in range(0, len(ids) - 1, self.max_length):
                windows.append((None, ids[start : start + 1], ids[start + 1 : start + 1 + self.max_length]))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (logprob, _greedy) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow prompts, up to the task's stop strings; long prompts lose their beginning."""
        texts = []
        with progress_bar("generating", len(requests)) as advance:
            for request in requests:
                prompt, options = request.args
                until = options.get("until", ())
                stop = [until] if isinstance(until, str) else list(until)
                new_tokens = min(options.get("max_gen_toks", _MAX_NEW_TOKENS), self.max_length - 1)
                ids = self.tok_encode(prompt)[-(self.max_length - new_tokens) :] or [self.prefix_token_id]
                temperature = options.get("temperature", 0.0) if options.get("do_sample", False) else 0.0
                (found,) = generate(
                    self.pretrained,
                    [ids],
                    new_tokens,
                    temperature=temperature,
                    stop=[text for text in stop if text],
                    logprobs=True,
                )
                texts.append(found.text if found.text is not None else self._decode(found.tokens))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                advance(len(texts))
        return texts

    def _decode(self, tokens: list[int]) -> str:
        return self.pretrained.tokenizer.decode(tokens)


def check_tasks(names: Sequence[str], manager: TaskManager | None = None) -> None:
    """Raises ValueError for names that are no tasks of the harness."""
    known = (manager or TaskManager()).all_tasks
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"config.tasks names {', '.join(unknown)}, which lm-evaluation-harness {lm_eval.__version__} lacks"
        )


def run_tasks(
    pretrained: PretrainedModel, tasks: Sequence[Any], limit: int | None = None, manager: TaskManager | None = None
) -> dict[str, dict[str, Any]]:
    """The harness' results of each task, by metric; JSON.

    Args:
      pretrained: the model.
      tasks: names of tasks, or configurations of tasks as dicts.
      limit: documents of each task; None takes all.
      manager: knows the tasks; None has those of the harness.
    """
    found = lm_eval.simple_evaluate(
        model=HarnessModel(pretrained), tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return {
        name: {metric: value for metric, value in metrics.items() if isinstance(value, int | float | str)}
        for name, metrics in found["results"].items()
    }

"""Multiple choice by log-likelihood: the answer of a model is the choice that it finds likeliest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bipolar_jax.checkpoint.json_text import parse_json
from bipolar_jax.models.inference.continuations import score_continuations
from bipolar_jax.models.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      question: the text before a choice.
      choices: texts, at least two, which follow the question and a space.
      answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """A JSONL file of {"question": text, "choices": [text, ...], "answer": index}; blank lines are skipped.

    Raises:
      ValueError: another content; the message names the line.
      FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no questions at {path}: give a JSONL file of {{"question", "choices", "answer"}}')
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            questions.append(_question(f"{path}, line {number}", line))
    if not questions:
        raise ValueError(f"{path} has no questions")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        fields = parse_json(line)
        question = Question(fields["question"], tuple(fields["choices"]), fields["answer"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is no question ({error!s:.100}): write question, choices and answer") from error
    if not all(isinstance(text, str) and text.strip() for text in (question.question, *question.choices)):
        raise ValueError(f"{where}: question and choices must be texts that are not empty")
    is_index = isinstance(question.answer, int) and not isinstance(question.answer, bool)
    if not is_index or not 0 <= question.answer < len(question.choices) or len(question.choices) < 2:
        raise ValueError(
            f"{where}: answer {question.answer!r} must be the index of one of at least 2 choices, which are "
            f"{len(question.choices)}"
        )
    return question


def continuation_ids(pretrained: PretrainedModel, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, cut where the context's own end: the tokens are those of the whole text."""
    context = context.rstrip()
    before, whole = pretrained.encode(context), pretrained.encode(f"{context} {continuation.strip()}")
    return whole[: len(before)], whole[len(before) :]


def answer_all(
    pretrained: PretrainedModel, questions: Sequence[Question], on_text: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Accuracy by the log-likelihood of whole choices, and by that of a byte of them; JSON.

    Returns:
      "accuracy", "accuracy_by_length" and their standard errors, None for one question; and "right" and
      "right_by_length", whether each question was answered right, to be paired with another model's.

    Raises:
      ValueError: see `score_continuations`.
    """
    pairs = [continuation_ids(pretrained, each.question, choice) for each in questions for choice in each.choices]
    scored = iter(score_continuations(pretrained.model, pairs, on_text=on_text))
    right, right_by_length = [], []
    for each in questions:
        logprobs = np.asarray([next(scored).logprob for _ in each.choices])
        lengths = np.asarray([len(choice.strip().encode()) for choice in each.choices])
        right.append(bool(np.argmax(logprobs) == each.answer))
        right_by_length.append(bool(np.argmax(logprobs / lengths) == each.answer))
    return {
        "questions": len(questions),
        **_rate("accuracy", right),
        **_rate("accuracy_by_length", right_by_length),
        "right": right,
        "right_by_length": right_by_length,
    }


def _rate(name: str, right: Sequence[bool]) -> dict[str, float | None]:
    mean, error = mean_and_error(right)
    return {name: mean, f"{name}_standard_error": error}


def mean_and_error(samples: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which one sample does not have."""
    values = np.asarray(samples, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error

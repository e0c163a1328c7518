"""Refuses tokenizers that take far more time or memory than a text's length warrants.

A tokenizer.json may hold any regular expressions and replacements. The tokenizers library gives up on an expression
after ten million steps from one position of the text, a quarter of a second, but not before it has tried every
position; and a chain of replacements multiplies the text's length.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from typing import Any

from bipolar_jax.extras import require

# Parts of tokenizer.json that hold expressions and replacements, and names of their lists.
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_LISTS = ("normalizers", "pretokenizers", "decoders")
# How many times as long replacements may make a text. Published tokenizers replace a space by one character.
_MOST_GROWTH = 1000
# An expression whose time grows with the cube of the length takes a second for 512 characters, with the square some
# milliseconds. Lengths double, so that the first one that takes too long ends soon.
_LENGTHS = (64, 128, 256, 512)
_MOST_SECONDS, _MOST_SECONDS_IN_ALL = 0.2, 1.0
# Runs of these, and of what an expression names, make it backtrack.
_UNITS = ("a", "A", "\u00e9", "\u6771", "1", " ", "\t", "\n", "!", "\u0301", "\U0001f600")
_MOST_UNITS = 48
_ESCAPE = re.compile(r"\\(?:x|u|x\{)([0-9a-fA-F]{2,6})")
_WORD = re.compile(r"[^\W_]{2,16}")


def check_limits(fields: dict[str, Any]) -> None:
    """Checks the expressions and replacements of a tokenizer that the library accepts.

    Args:
      fields: the object in tokenizer.json.

    Raises:
      ValueError: an expression that takes more than quadratic time, or replacements that make a text more than a
        thousand times as long. The message does not name the file.
    """
    components = {part: list(_components(fields.get(part))) for part in _PARTS}
    for part, found in components.items():
        growth = 1
        for component in found:
            if component.get("type") == "Replace" and isinstance(component.get("content"), str):
                growth *= max(1, len(component["content"]) + _matches_nothing(component.get("pattern")))
        if growth > _MOST_GROWTH:
            raise ValueError(f"the replacements of its {part} make a text more than {_MOST_GROWTH} times as long")
    for found in components.values():
        for component in found:
            pattern = component.get("pattern")
            expression = pattern.get("Regex") if isinstance(pattern, dict) else None
            if isinstance(expression, str) and (problem := _problem_of(expression)):
                raise ValueError(f"its regular expression {expression!r:.80} {problem}")


def _components(component: Any) -> Iterator[dict[str, Any]]:
    """The component and those in its lists."""
    if isinstance(component, dict):
        yield component
        for name in _LISTS:
            for item in component.get(name) or ():
                yield from _components(item)


def _matches_nothing(pattern: Any) -> bool:
    """Whether a pattern may match between characters."""
    return not (isinstance(pattern, dict) and pattern.get("String"))


@functools.lru_cache(maxsize=64)
def _problem_of(expression: str) -> str | None:
    """What goes wrong when texts are split by the expression; None if nothing does."""
    library = require("tokenizers", "models")
    split = library.pre_tokenizers.Split(library.Regex(expression), "isolated")
    units, literals = _units(expression)
    spent = 0.0
    for length in _LENGTHS:
        for unit in units:
            # The expression's own characters at the end, without which the library need not search at all.
            text = unit * (length // len(unit)) + f"\0\n{literals}"
            started = time.thread_time()
            try:
                split.pre_tokenize_str(text)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # panics of the library are no Exceptions
                return f"cannot split {unit!r} repeated {length // len(unit)} times ({error!s:.100})"
            seconds = time.thread_time() - started
            spent += seconds
            if seconds > _MOST_SECONDS or spent > _MOST_SECONDS_IN_ALL:
                return f"takes {seconds:.2g} s to split {unit!r} repeated {length // len(unit)} times"
    return None


def _units(expression: str) -> tuple[list[str], str]:
    """Texts to repeat, and the distinct characters of the expression."""
    escaped = [chr(code) for digits in _ESCAPE.findall(expression) if (code := int(digits, 16)) < 0xD800]
    characters = list(dict.fromkeys([*escaped, *expression]))[: 2 * _MOST_UNITS]
    return list(dict.fromkeys([*_UNITS, *_WORD.findall(expression), *characters]))[:_MOST_UNITS], "".join(characters)

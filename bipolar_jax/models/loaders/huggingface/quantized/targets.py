"""Which layers a group of compressed-tensors' configs names: layers, expressions, or the class of all linear layers."""

from __future__ import annotations

import dataclasses
import re

from bipolar_jax.models.loaders.huggingface.json_fields import Fields

_MOST_REPEATS, _MOST_CHARACTERS = 6, 400


@dataclasses.dataclass(frozen=True)
class Targets:
    """Names of layers, "re:" and a regular expression that matches their beginning, or "Linear" for all."""

    texts: tuple[str, ...]

    @classmethod
    def of(cls, fields: Fields, name: str, *, empty: bool = False) -> Targets:
        """The field of a name, a list of texts or one text.

        Raises:
          ValueError: another value, no text unless `empty`, or an expression that is damaged or could take for ever to
            match.
        """
        texts = fields.get(name, [])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not (texts or empty):
            raise fields.wrong(name, texts, "a list of texts")
        for text in texts:
            if text.startswith("re:"):
                _check_expression(fields, name, text[3:])
        return cls(tuple(texts))

    @property
    def order(self) -> tuple[bool, bool]:
        """Names go before expressions, and these before the class of all layers."""
        return "Linear" in self.texts, any(text.startswith("re:") for text in self.texts)

    def match(self, name: str) -> bool:
        """Whether they name a linear layer."""
        return any(
            re.match(text[3:], name) is not None if text.startswith("re:") else text in ("Linear", name)
            for text in self.texts
        )


def _check_expression(fields: Fields, name: str, expression: str) -> None:
    """Raises ValueError for an expression that is damaged, or that could take for ever to match."""
    repeats = len(re.findall(r"[*+?{]", expression))
    if repeats > _MOST_REPEATS or re.search(r"\)[*+{]", expression) or len(expression) > _MOST_CHARACTERS:
        raise fields.wrong(name, expression, f"an expression of at most {_MOST_REPEATS} repeats, none of a group")
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise fields.wrong(name, expression, "a regular expression") from error

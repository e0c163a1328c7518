"""Which precision each layer gets: the first rule that matches its path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from bipolar_jax.quantize import Precision

Rules = Sequence[tuple[str, Precision | None]]

_NUM_NEAR_MISSES = 5


def decide(
    rules: Rules, paths: Sequence[str], others: Mapping[str, str], eligible: str, tied: Sequence[str] = ()
) -> dict[str, Precision | None]:
    """Precision, or None, of every path that a rule matches.

    Args:
      rules: (pattern, precision) pairs, see `quantize_model`.
      paths: of the layers to decide, each once.
      others: layers that cannot be quantized, path to class name; for errors.
      eligible: names of the classes that can, for errors.
      tied: further paths of layers that are decided by another path; for errors.

    Raises:
      ValueError: a rule that decides no layer, or is none.
    """
    compiled = [_compile(rule) for rule in rules]
    deciding, precisions = set(), {}
    for path in paths:
        index = next((i for i, (pattern, _) in enumerate(compiled) if pattern.search(path)), None)
        deciding.add(index)
        if index is not None:
            precisions[path] = compiled[index][1]
    for index, (pattern, _) in enumerate(compiled):
        if index not in deciding:
            raise ValueError(_why_useless(pattern, list(dict.fromkeys([*paths, *tied])), others, eligible))
    return precisions


def _compile(rule: tuple[str, Precision | None]) -> tuple[re.Pattern[str], Precision | None]:
    if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
        raise ValueError(f"a rule is a pair of a pattern and a Precision, got {rule!r}")
    pattern, precision = rule
    if precision is not None and not isinstance(precision, Precision):
        raise ValueError(
            f"rule {pattern!r} has the precision {precision!r}: give a Precision, as Precision.parse reads it, or None"
        )
    try:
        return re.compile(pattern), precision
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from error


def _why_useless(pattern: re.Pattern[str], paths: list[str], others: Mapping[str, str], eligible: str) -> str:
    shadowed = [path for path in paths if pattern.search(path)]
    if shadowed:
        return (
            f"rule {pattern.pattern!r} decides no layer: all it matches ({', '.join(shadowed[:_NUM_NEAR_MISSES])}) "
            "is decided by earlier rules, or by the first path of a tied layer; move it up or drop it"
        )
    unfit = [f"{path} ({kind})" for path, kind in others.items() if pattern.search(path)]
    if unfit and pattern.pattern not in ("", ".*"):
        return (
            f"rule {pattern.pattern!r} matches no layer that can be quantized, only "
            f"{', '.join(unfit[:_NUM_NEAR_MISSES])}: those that can are {eligible}; drop the rule, or use one of them"
        )
    if not paths:
        return (
            f"rule {pattern.pattern!r} matches nothing: the model has no {eligible} left in float; "
            "layers that are packed already are not packed again"
        )
    near = difflib.get_close_matches(pattern.pattern, paths, n=_NUM_NEAR_MISSES, cutoff=0.0)
    return f"rule {pattern.pattern!r} matches no layer; the nearest paths are {', '.join(near)}"

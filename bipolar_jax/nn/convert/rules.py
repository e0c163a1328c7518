"""Path rules: the first rule whose pattern matches the path of a layer gives its precision."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.quantize import Precision

Rules = Sequence[tuple[str, Precision | str | None]]

_NUM_NEAR_MISSES = 5


def match_rules(
    rules: Rules,
    paths: Sequence[str],
    others: Mapping[str, str],
    eligible: str,
    tied: Sequence[str] = (),
    names: Callable[[str], tuple[str, ...]] = lambda path: (path,),
) -> dict[str, Precision | None]:
    """The precision (or None) of every path that a rule matches.

    Args:
      rules: (pattern, precision) pairs, see `quantize_model`.
      paths: one path of every layer that can be quantized.
      others: class names of the other layers by path, or why they stay float, for the messages of errors.
      eligible: the classes that can be quantized, for the messages of errors.
      tied: all paths of the layers, including further paths of tied layers, for the messages of
        errors.
      names: of a path, the texts in which patterns are searched for.

    Raises:
      ValueError: a rule that decides no layer, or that is not a (pattern, precision) pair; a text that is no precision.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise ValueError(
            f'rules must be a list of (pattern, precision) pairs, such as [(".*", "W4A8")], got {rules!r:.60}'
        )
    compiled = [_compile(rule) for rule in rules]
    used, precisions = set(), {}
    for path in paths:
        index = next((i for i, (pattern, _) in enumerate(compiled) if any(map(pattern.search, names(path)))), None)
        used.add(index)
        if index is not None:
            precisions[path] = compiled[index][1]
    for index, (pattern, _) in enumerate(compiled):
        if index not in used:
            candidates = list(dict.fromkeys(name for path in (*paths, *tied) for name in names(path)))
            raise ValueError(_explain_unused(pattern, candidates, others, eligible))
    return precisions


def chosen_precision(rules: Rules, *names: str) -> Precision | None:
    """The precision of the first rule that matches one of a layer's names; None if that is None, or no rule matches."""
    compiled = map(_compile, rules)
    return next((precision for pattern, precision in compiled if any(map(pattern.search, names))), None)


def trained_precisions(layers: Mapping[str, LayerQuantization | None]) -> dict[str, Precision]:
    """The precisions of the layers that were trained with `DotGeneral`, by path.

    Raises:
      ValueError: no layer was trained with `DotGeneral`.
    """
    precisions = {path: trained.dot_general.precision for path, trained in layers.items() if trained is not None}
    if not precisions:
        raise ValueError(
            "no layer of the model was trained with DotGeneral, so rules must say what to quantize: "
            '[(".*", "W4A8")] quantizes every layer'
        )
    return precisions


def _compile(rule: tuple[str, Precision | str | None]) -> tuple[re.Pattern[str], Precision | None]:
    """Checks a rule and compiles its pattern. Raises ValueError as `match_rules`."""
    if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
        raise ValueError(f"a rule must be a pair of a pattern and a precision or None, got {rule!r}")
    pattern, precision = rule
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from error
    try:
        return compiled, None if precision is None else Precision.of(precision)
    except ValueError as error:
        raise ValueError(f"rule {pattern!r}: {error}; None leaves layers float") from error


def _explain_unused(pattern: re.Pattern[str], paths: list[str], others: Mapping[str, str], eligible: str) -> str:
    """The message for a rule that decides no layer: the reason, and the remedy."""
    shadowed = [path for path in paths if pattern.search(path)]
    if shadowed:
        return (
            f"rule {pattern.pattern!r} decides no layer: the layers that it matches "
            f"({', '.join(shadowed[:_NUM_NEAR_MISSES])}) are decided by earlier rules, or by the first path of a tied "
            "layer; move the rule up or drop it"
        )
    unsupported = [f"{path} ({kind})" for path, kind in others.items() if pattern.search(path)]
    if unsupported and pattern.pattern not in ("", ".*"):
        return (
            f"rule {pattern.pattern!r} matches no layer that can be quantized, only "
            f"{', '.join(unsupported[:_NUM_NEAR_MISSES])}: {eligible} can be quantized; drop the rule, or use one of "
            "these classes"
        )
    if not paths:
        return (
            f"rule {pattern.pattern!r} matches nothing: the model has no {eligible} with float weights; "
            "packed layers are not packed again"
        )
    near = difflib.get_close_matches(pattern.pattern, paths, n=_NUM_NEAR_MISSES, cutoff=0.0)
    return f"rule {pattern.pattern!r} matches no layer; the nearest paths are {', '.join(near)}"

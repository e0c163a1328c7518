"""Rules for single layers of stacks: where they begin to differ, stacks are cut into runs of equal layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flax import nnx

from bipolar_jax.nn.compressible import Layered, run_name, run_of_name
from bipolar_jax.nn.convert.float_layers import float_layers
from bipolar_jax.nn.convert.rules import Rules, chosen_precision

# The texts that a rule's pattern is searched for in, of a layer's path.
Names = Callable[[str], tuple[str, ...]]


def cut_by_rules[Model: nnx.Module](model: Model, rules: Rules) -> tuple[Model, Rules]:
    """The model with its stacks cut where rules give consecutive layers other precisions; and rules without ranges.

    A pattern finds a layer by its path within the whole stack, "layers/ffn/down_proj", or by its own,
    "layers/3/ffn/down_proj". A range such as "layers/0-4/" in a pattern stands for the layers 0 to 4. Models that are
    not `Layered` stay as they are.

    Raises:
      ValueError: a rule that is no pair of a pattern and a precision, see `quantize_model`.
    """
    if not isinstance(model, Layered):
        return model, rules
    rules = [_without_ranges(rule, model.stack) for rule in rules]
    paths = [layer.path for layer in float_layers(model) if layer.path.startswith(f"{model.stack}/")]
    runs: list[range] = []
    for run in model.runs:
        inner = [path.removeprefix(prefix) for path in paths if path.startswith(prefix := _prefix(model, run))]
        previous = None
        for layer in run:
            chosen = tuple(chosen_precision(rules, *_names(model.stack, layer, path)) for path in inner)
            if layer == run.start or chosen != previous:
                runs.append(range(layer, layer + 1))
            else:
                runs[-1] = range(runs[-1].start, layer + 1)
            previous = chosen
    return (model if tuple(runs) == model.runs else model.with_runs(runs)), rules


def names_of_layers(model: nnx.Module) -> Names:
    """What patterns are searched for in, by the path of a layer; of a model that `cut_by_rules` has cut."""
    if not isinstance(model, Layered):
        return lambda path: (path,)
    prefixes = {_prefix(model, run): run for run in model.runs}

    def names(path: str) -> tuple[str, ...]:
        for prefix, run in prefixes.items():
            if path.startswith(prefix):
                return path, *_names(model.stack, run.start, path.removeprefix(prefix))
        return (path,)

    return names


def _names(stack: str, layer: int, path: str) -> tuple[str, str]:
    """Two names of a layer's module: as of the whole stack, and of this layer alone."""
    return f"{stack}/{path}", f"{stack}/{layer}/{path}"


def _prefix(model: Layered, run: range) -> str:
    """How the paths of a run's modules begin."""
    return f"{model.stack}/" if len(model.runs) == 1 else f"{model.stack}/{run_name(run)}/"


def _without_ranges(rule: Any, stack: str) -> Any:
    """The rule with ranges of layers in its pattern spelled out; what is no rule is refused later."""
    if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
        return rule

    def spelled(match: re.Match[str]) -> str:
        layers = run_of_name(f"{match[1]}-{match[2]}")
        return f"{stack}/(?:{'|'.join(map(str, layers))})/"

    return re.sub(rf"{re.escape(stack)}/(\d+)\\?-(\d+)/", spelled, rule[0]), rule[1]

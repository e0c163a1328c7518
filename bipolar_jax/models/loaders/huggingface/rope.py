"""RoPE in config.json: rope_scaling beside rope_theta (old), or rope_parameters (new), as transformers reads them."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

from bipolar_jax.models.config import RopeScaling
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.json_fields import Fields

_KINDS = ("rope_type", "type")
# Fields that transformers knows, also where a kind has no use for them; "finetuned" is a remark of YaRN's authors.
_KNOWN = {
    *_KINDS,
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "truncate",
    "finetuned",
}
# Fields that do not scale anything, and so need no kind.
_WITHOUT_KIND = {*_KINDS, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def rope_config(
    fields: Fields,
    context: int,
    *,
    theta: float = 10000.0,
    head_dim: int | None = None,
    renamed: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """The fields rope_theta, rope_scaling and, if a part of each head is rotated, rotary_dim of TransformerConfig.

    Args:
      fields: config.json.
      context: the model's context length.
      theta: rope_theta where it is absent.
      head_dim: numbers of a head, where an architecture can rotate a part of them; None where it cannot.
      renamed: kinds that the architecture reads as others.

    Raises:
      ValueError: an unsupported kind, or fields that are unknown, contradict each other or lack their kind.
    """
    rope = _rope_fields(fields)
    partial = rope.number("partial_rotary_factor", 1.0)
    if partial != 1 and (head_dim is None or not 0 < partial < 1):
        raise ValueError(
            f"{rope.source} has a partial_rotary_factor of {partial:g}: only rotation of whole heads is supported, and "
            "in Phi models of a part"
        )
    rotary = {} if partial == 1 else dict(rotary_dim=int(head_dim * partial))
    scaling = _rope_scaling(rope, context, renamed)
    with errors_name(fields.source):
        scaling = RopeScaling(**scaling) if scaling else None
        return dict(rope_theta=rope.number("rope_theta", theta), rope_scaling=scaling, **rotary)


def _rope_fields(fields: Fields) -> Fields:
    """The fields of either form, with those that stand at the top of config.json."""
    old, new = (_non_null(fields.nested(name)) for name in ("rope_scaling", "rope_parameters"))
    if old and new and _with_kind(old) != _with_kind(new):
        raise ValueError(
            f"{fields.source} has both rope_scaling and rope_parameters, which differ: delete the one that is wrong"
        )
    name, values = ("rope_parameters", new) if new else ("rope_scaling", old)
    if nested := [key for key, value in values.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{fields.source} has {name} by type of layer ({', '.join(nested):.60}): only one for all is supported"
        )
    if unknown := sorted(set(values) - _KNOWN):
        raise ValueError(f"{fields.source} has {name} with unknown fields {unknown!s:.100}: correct or delete them")
    top = {name: fields.get(name) for name in ("rope_theta", "partial_rotary_factor") if fields.get(name) is not None}
    original = fields.get("original_max_position_embeddings")
    if original is not None:  # of this field transformers prefers the one at the top
        values = values | {"original_max_position_embeddings": original}
    return Fields(top | values, fields.source)


def _non_null(fields: Fields) -> dict[str, Any]:
    return {name: value for name, value in fields.values.items() if value is not None}


def _with_kind(values: dict[str, Any]) -> dict[str, Any]:
    """The fields with one name for the kind, to compare the two forms."""
    return {"rope_type": values.get("type"), **{name: value for name, value in values.items() if name != "type"}}


def _kind(rope: Fields) -> str:
    kinds = [rope.get(name) for name in _KINDS if rope.get(name) is not None]
    if any(kind != kinds[0] for kind in kinds[1:]):
        raise ValueError(f"{rope.source} has the rope_type {kinds[0]!r:.40} and the type {kinds[1]!r:.40}: delete one")
    if not kinds:
        if scaling := sorted(set(rope.values) - _WITHOUT_KIND):
            raise ValueError(
                f"{rope.source} has RoPE scaling without a rope_type, but with {', '.join(scaling)}: add its rope_type"
            )
        return "default"
    return kinds[0]


def _rope_scaling(rope: Fields, context: int, renamed: Mapping[str, str]) -> dict[str, Any] | None:
    """Keyword arguments of RopeScaling, or None without scaling."""
    kind = _kind(rope)
    kind = renamed.get(kind, kind) if isinstance(kind, str) else kind
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return dict(kind="linear", factor=rope.number("factor"))
    original = rope.size("original_max_position_embeddings", context)
    if kind == "llama3":
        return dict(
            kind="llama3",
            factor=rope.number("factor"),
            original_context_length=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "longrope":
        return dict(
            kind="longrope",
            factor=max(rope.number("factor", context / original), 1.0),
            original_context_length=original,
            attention_factor=None if rope.get("attention_factor") is None else rope.number("attention_factor"),
            factors=_numbers(rope, "long_factor"),
            short_factors=_numbers(rope, "short_factor"),
        )
    if kind != "yarn":
        raise ValueError(
            f"{rope.source} has RoPE scaling {kind!r:.60}, supported are default, linear, llama3, yarn, longrope"
        )
    if not rope.flag("truncate", True):
        raise ValueError(f"{rope.source} has YaRN with truncate false: only the truncated band limits are supported")
    factor = rope.number("factor")
    return dict(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _numbers(rope: Fields, name: str) -> tuple[float, ...]:
    """A list of numbers. Raises ValueError for another value."""
    values = rope.get(name)
    if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
        raise rope.wrong(name, values, "a list of numbers")
    return tuple(values)


def _yarn_attention_factor(rope: Fields, factor: float) -> float | None:
    """attention_factor, or DeepSeek's ratio of mscale and mscale_all_dim, or None (derived from `factor`)."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    numerator, denominator = (0.1 * rope.number(name) * math.log(factor) + 1.0 for name in ("mscale", "mscale_all_dim"))
    return numerator / denominator

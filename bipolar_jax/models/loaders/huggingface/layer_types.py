"""Which layers attend to a window of positions, as config.json says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bipolar_jax.models.loaders.huggingface.json_fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
# A damaged config may ask for billions; a list of them would fill the memory.
MOST_LAYERS = 1 << 16


def read_windows(
    fields: Fields, layers: int, window: int | None, has_window: Callable[[int], bool] | None = None
) -> dict[str, Any]:
    """The fields window and window_layers of TransformerConfig; none of them if no layer has a window.

    Args:
      fields: config.json, whose layer_types say which layers have one.
      layers: number of layers.
      window: positions that such layers attend to; None if there are none.
      has_window: whether a layer has one where there are no layer_types; None says all, whatever layer_types say.

    Raises:
      ValueError: layer_types of another form, or of another number of layers; implausibly many layers.
    """
    kinds = fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds)):
        raise fields.wrong("layer_types", kinds, f'a list of "{FULL}" and "{SLIDING}"')
    if window is None:
        return {}
    if has_window is None:
        return dict(window=window)
    if layers > MOST_LAYERS:
        raise ValueError(f"{fields.source} has {layers} layers, at most {MOST_LAYERS} are plausible")
    if kinds is not None and len(kinds) != layers:
        raise ValueError(f"{fields.source} has {len(kinds)} layer_types for {layers} layers: correct one of them")
    if kinds is None:
        kinds = [SLIDING if has_window(layer) else FULL for layer in range(layers)]
    found = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    if not found:
        return {}
    return dict(window=window, window_layers=None if len(found) == layers else found)


def sliding_window(fields: Fields, default: int | None, context: int | None = None) -> int | None:
    """sliding_window: null is none, an absent field the default; one of the whole context or more is none."""
    if "sliding_window" not in fields.values:
        window = default
    else:
        window = None if fields.get("sliding_window") is None else fields.size("sliding_window")
    return None if window is None or (context is not None and window >= context) else window

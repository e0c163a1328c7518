"""Makes integers of the float scales of groups in a whole model, and says what that costs each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from flax import nnx

from bipolar_jax.nn.convert.summary import packed_layers
from bipolar_jax.nn.layers.einsum import Einsum
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.packing import BipolarArray, BipolarNumbers, BlockScaledArray
from bipolar_jax.quantize.integer_groups import MOST_BITS


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """One packed layer.

    Attributes:
      path: the first path to the layer, "" for the model itself.
      precision: of the layer in the result, such as "W4A8g64".
      errors: the squared error of the weights relative to their squares, for each matrix of a stack; () if the layer
        is unchanged.
      note: why it is unchanged; "" if it is converted.
    """

    path: str
    precision: str
    errors: tuple[float, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The packed layers of a model; its `str` is a table."""

    layers: tuple[ConvertedLayer, ...]

    def __str__(self) -> str:
        rows = [("layer", "precision", "relative squared error", "largest of the stack", "")]
        rows += [(each.path or ".", each.precision, *_cells(each), each.note) for each in self.layers]
        return "\n".join(_aligned(rows))


def with_integer_groups[Model: nnx.Module](model: Model) -> tuple[Model, ConversionReport]:
    """A copy of a model whose packed layers with float scales of groups have integer ones; the codes are the same.

    Products then sum over all of K in int32. Layers of more than 6 bits and of one scale a channel stay as they are.
    The conversion costs little up to 4 bits and much above, see `BipolarArray.to_integer_groups`. Where the float model
    is at hand, quantize it to integer groups, such as "W4A8g64": that search rounds the weights to the new grids.

    Args:
      model: any NNX module with packed layers, before `prepare_for_inference`; it is not changed. The copy shares the
        arrays that stay.

    Returns:
      The copy, and what has become of every layer; print it for a table.

    Raises:
      ValueError: not an NNX module; no packed layers; weights laid out for a device, as `prepare_for_inference` makes
        them; scales below zero, NaN or Inf.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"got a {type(model).__name__}: give an nnx.Module")
    converted = nnx.clone(model)
    layers = packed_layers(converted)
    if not layers:
        raise ValueError("the model has no packed layers: quantize it first, for example to W4A8g64")
    return converted, ConversionReport(tuple(_convert(path, layer) for path, layer in layers))


def _convert(path: str, layer: Linear | Einsum | Embed) -> ConvertedLayer:
    """Converts the weights of one layer in place. Raises ValueError that names the path."""
    name = "embedding" if isinstance(layer, Embed) else "kernel"
    weights = getattr(layer, name)
    array = weights.get_value()
    if note := _why_unchanged(array):
        return ConvertedLayer(path, str(layer.precision), (), note)
    try:
        if isinstance(array, BlockScaledArray):
            array = array.with_scales()
        if not isinstance(array, BipolarArray):
            raise ValueError(f"{array} is laid out for a device: convert before prepare_for_inference")
        integers, errors = array.to_integer_groups()
    except ValueError as error:
        raise ValueError(f"cannot convert layer {path or '.'}: {error}") from error
    setattr(layer, name, weights.replace(integers))
    layer.precision = dataclasses.replace(layer.precision, scales="integer")
    if getattr(layer, "trained", None) is not None:
        layer.trained = dataclasses.replace(layer.trained, scales="integer")
    if getattr(layer, "learned_steps", False):
        layer.learned_steps = False  # step sizes are floats
    return ConvertedLayer(path, str(layer.precision), tuple(np.asarray(errors, float).reshape(-1).tolist()))


def _why_unchanged(array: BipolarNumbers) -> str:
    if array.groups is not None:
        return "has integer groups"
    if array.group_size is None:
        return "one scale a channel"
    return f"more than {MOST_BITS} bits" if array.bits > MOST_BITS else ""


def _cells(layer: ConvertedLayer) -> tuple[str, str]:
    if layer.note:
        return "-", "-"
    mean, most = np.mean(layer.errors), max(layer.errors)
    return f"{mean:.2e}", f"{most:.2e}" if len(layer.errors) > 1 else ""


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

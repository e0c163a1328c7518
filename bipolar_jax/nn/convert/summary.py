"""A table of a model's layers: precision, size, and what stayed float and why."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from bipolar_jax.nn.convert.float_layers import float_layers, parameter_bytes
from bipolar_jax.nn.convert.layer_paths import first_references, layer_references, own_parameters, own_weights
from bipolar_jax.nn.layers.einsum import Einsum
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.layers.packed import format_bytes, num_bytes, num_parameters
from bipolar_jax.nn.training.layer_quantization import LayerQuantization

_PACKED_LAYERS = (Linear, Einsum, Embed)


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer of a model.

    Attributes:
      path: the first path to the layer, "" for the model itself.
      name: its class.
      precision: such as "W4A8g64", or the dtype of a float layer.
      parameters: numbers that the layer holds, with its bias.
      num_bytes: their memory, with scales, offsets and row sums.
      note: why the layer is float; of packed layers, which part of a token's range they quantize if not all of it.
      is_packed: whether the layer is packed.
    """

    path: str
    name: str
    precision: str
    parameters: int
    num_bytes: int
    note: str = ""
    is_packed: bool = False


def layer_summaries(model: nnx.Module) -> list[LayerSummary]:
    """All layers of a model with parameters of their own: the packed ones, then the float ones."""
    packed = []
    for path, layer in packed_layers(model):
        values = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(layer))]
        size, count = sum(map(num_bytes, values)), sum(map(num_parameters, values))
        span = layer.precision.a_span
        note = "" if span == 1 else f"tokens are clipped to {span:g} of their range"
        packed.append(LayerSummary(path, type(layer).__name__, str(layer.precision), count, size, note, is_packed=True))
    return [*packed, *map(_float_summary, float_layers(model))]


def packed_layers(model: nnx.Module) -> list[tuple[str, Any]]:
    """The packed layers of a model, subclasses too, each with the first path to it."""
    if isinstance(model, _PACKED_LAYERS):
        return [("", model)]
    subclasses = {type(layer) for _, layer in nnx.iter_modules(model) if isinstance(layer, _PACKED_LAYERS)}
    references = layer_references(model, (*_PACKED_LAYERS, *subclasses))
    return [(r.path, r.layer) for r in first_references(references).values()]


def _float_summary(found) -> LayerSummary:
    values = [variable.get_value() for variable in own_parameters(found.layer).values()]
    dtypes = sorted({value.dtype.name for value in values})
    note = found.reason
    if note is not None:
        note = f"not packed: {note}" if own_weights(found.layer) else "no weights to pack"
    elif (trained := LayerQuantization.of(found.layer)) is not None:
        note = f"in training at {trained.dot_general.precision}"
    else:
        note = "no rule has chosen it"
    count = sum(map(num_parameters, values))
    return LayerSummary(found.path, found.name, "/".join(dtypes), count, parameter_bytes(found.layer), note)


def summary(model: nnx.Module) -> None:
    """Prints the layers of a model: path, class, precision, parameters, bytes, and why float layers are float.

    `bipolar_jax.nn.layer_summaries` returns the same as data.

    Raises:
      ValueError: not an NNX module.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"got a {type(model).__name__}: give an nnx.Module")
    layers = layer_summaries(model)
    rows = [("layer", "class", "precision", "parameters", "bytes", "")]
    rows += [
        (each.path or ".", each.name, each.precision, f"{each.parameters:,}", format_bytes(each.num_bytes), each.note)
        for each in layers
    ]
    for name, is_packed in (("packed", True), ("float", False)):
        chosen = [each for each in layers if each.is_packed == is_packed]
        count, size = sum(x.parameters for x in chosen), sum(x.num_bytes for x in chosen)
        rows.append((f"{len(chosen)} {name}", "", "", f"{count:,}", format_bytes(size), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if 3 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())

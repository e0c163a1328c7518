"""Prepares a model for fast generation: joined layers, weights as the device multiplies them, and the dtype."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.blocks.fused_decode import MOST_SEQUENCES
from bipolar_jax.models.inference.join import join_with_reasons
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Linear, Packed
from bipolar_jax.nn.layers.linear import is_plain
from bipolar_jax.ops.compiled import compile_together, described, on_one_device
from bipolar_jax.ops.dispatch import hopper_serves
from bipolar_jax.packing import BipolarArray, BipolarNumbers, BlockScaledArray, PreparedArray
from bipolar_jax.packing.float_terms import FloatTerms, shared_terms
from bipolar_jax.packing.prepared_array import check_preparable, has_float_groups

Layout = Literal["planes", "bytes", "tensor_cores"]


def prepare_for_inference[Model: (Transformer, PretrainedModel)](
    model: Model, dtype: Any = None, *, layout: Layout | None = None, fused_sequences: int = MOST_SEQUENCES
) -> Model:
    """A copy of the model, ready for `generate`, `stream` and `perplexity`; unchanged arrays are shared.

    Packed layers of the same input are joined (`join_projections`), so that a Hopper GPU can run all layers of a decode
    step as one kernel; float parameters, and what the layers compute in, become `dtype`. Weights take the layout that
    the device multiplies; the numbers stay the same. `explain_model` says which kernels the result runs, and why not
    others. `save_model` takes the model before it is prepared.

    Args:
      model: the model, quantized or not, or with its tokenizer.
      dtype: a float dtype; None takes bfloat16 for float32 models on GPUs, whose fastest kernels take 16-bit floats,
        and else keeps the model's own.
      layout: of packed weights. "planes" leaves them as they are. "bytes" makes one byte of each (`UnpackedArray`),
        8 / n times the memory of n bits, which CPUs multiply several times as fast; layers that name another backend
        than XLA stay planes. "tensor_cores" lays them out for Hopper's int8 tensor cores (`PreparedArray`) in the same
        memory; tables that make no logits or have float scales of groups, layers that name another backend, layers with
        float activations unless they have groups and compute in 16 bits, and what has no such layout
        (`BipolarArray.prepare`) stay planes. None takes "bytes" on CPUs, and on Hopper GPUs "tensor_cores" for layers
        with groups, or with 4 or 8 bits, one scale a column and activations of 3 bits or more.
      fused_sequences: decode steps of up to so many sequences ask for one kernel of all layers. Hopper's takes several,
        up to 4, of layers laid out for tensor cores whose sums are integers; others, and more sequences, are decoded
        layer by layer.

    Raises:
      ValueError: dtype is no float dtype, an unknown layout, or no sequence.

    Warns:
      UserWarning: packed layers stay apart, for example because their precisions differ; the message says which and
        why.
    """
    if isinstance(model, PretrainedModel):
        options = {"layout": layout, "fused_sequences": fused_sequences}
        return model.with_model(prepare_for_inference(model.model, dtype, **options))
    if layout not in (None, *get_args(Layout)):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, or None, got {layout!r}")
    if fused_sequences < 1:
        raise ValueError(f"fused_sequences must be 1 or more, got {fused_sequences!r}")
    prepared, reasons = join_with_reasons(model)
    prepared.fused_sequences = fused_sequences
    if reasons:
        warnings.warn(f"layers stay apart, which decodes more slowly: {'; '.join(reasons)}", stacklevel=2)
    if dtype is None:
        is_wide = prepared.final_norm.scale.dtype == jnp.float32
        dtype = jnp.bfloat16 if is_wide and default_device().platform == "gpu" else prepared.final_norm.scale.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype, such as bfloat16, got {jnp.dtype(dtype).name}")
    if layout == "tensor_cores" or (layout is None and hopper_serves()):
        _lay_out_for_tensor_cores(prepared, jnp.dtype(dtype), everything=layout is not None)
    elif layout == "bytes" or (layout is None and default_device().platform == "cpu"):
        _unpack(prepared)
    return _in_dtype(prepared, jnp.dtype(dtype))


def _unpack(model: Transformer) -> None:
    """Unpacks the weights of the layers that XLA multiplies, one layer at a time."""
    for _, layer in list(nnx.iter_modules(model)):
        is_multiplied = isinstance(layer, Embed) or is_plain(layer)
        if not is_multiplied or layer.implementation not in ("auto", "xla"):
            continue
        weights = _weights(layer)
        if isinstance(weights, BipolarArray | BlockScaledArray):
            _set_weights(layer, weights.unpack())


def _weights(layer: Embed | Linear) -> BipolarNumbers:
    return (layer.embedding if isinstance(layer, Embed) else layer.kernel).get_value()


def _set_weights(layer: Embed | Linear, weights: BipolarNumbers) -> None:
    setattr(layer, "embedding" if isinstance(layer, Embed) else "kernel", Packed(weights))


def belongs_on_tensor_cores(w_bits: int, a_bits: int | None, *, has_groups: bool) -> bool:
    """Whether weights that int8 tensor cores can multiply are faster so than as planes.

    Products of fewer pairs of planes belong on the binary tensor cores; other widths with one scale a column have not
    been timed.
    """
    return has_groups or (w_bits in (4, 8) and a_bits is not None and a_bits >= 3)


def _lay_out_for_tensor_cores(model: Transformer, dtype: jnp.dtype, *, everything: bool) -> None:
    """Prepares the weights of layers that Hopper's tensor cores can multiply, one layer at a time.

    Without `everything` those that are faster so.
    """
    modules, layers = list(nnx.iter_modules(model)), []
    gated = [module.gate_up_proj for _, module in modules if hasattr(module, "gate_up_proj")]
    for _, layer in modules:
        # A table that makes logits too: its rows can be looked up in this layout.
        is_table = isinstance(layer, Embed) and layer is model.output_layer
        if not (is_table or is_plain(layer)) or layer.implementation not in ("auto", "sm90"):
            continue
        weights, is_gated = _weights(layer), any(layer is each for each in gated)
        if not isinstance(weights, BipolarArray | BlockScaledArray) or (is_table and has_float_groups(weights)):
            continue
        a_bits, has_groups = layer.precision.a_bits, weights.has_integer_groups or has_float_groups(weights)
        if a_bits is None and not (dtype.itemsize == 2 and has_groups):
            continue
        if not (everything or belongs_on_tensor_cores(weights.bits, a_bits, has_groups=has_groups)):
            continue
        if isinstance(weights, BlockScaledArray) and weights.prepared_terms is None:
            weights = weights.with_scales()
            _set_weights(layer, weights)
        try:
            check_preparable(weights, is_gated)
        except ValueError:
            continue
        layers.append((layer, is_gated))
    # The decode step takes one form for all layers. Integers of groups stay what they are.
    scaled = [w for layer, _ in layers if has_float_groups(w := _weights(layer)) and isinstance(w, BipolarArray)]
    terms = {fmt: shared_terms([w for w in scaled if w.format == fmt]) for fmt in {w.format for w in scaled}}
    del scaled  # so that each layer's planes are freed with it

    def operands(layer: Embed | Linear, is_gated: bool) -> tuple:
        weights = _weights(layer)
        float_terms = None
        if has_float_groups(weights):
            float_terms = weights.prepared_terms if isinstance(weights, BlockScaledArray) else terms[weights.format]
        return weights, is_gated, float_terms, layer.precision.a_bits is None

    programs = {}
    for layer, is_gated in layers:
        weights, *static = operands(layer, is_gated)
        leaves, structure = jax.tree.flatten(weights)
        if on_one_device(leaves):
            arrays = tuple(map(described, leaves))
            programs[structure, arrays, *static] = structure.unflatten(arrays), *static
    compile_together(_prepared.lower(*each) for each in programs.values())
    for layer, is_gated in layers:
        _set_weights(layer, _prepared(*operands(layer, is_gated)))


@functools.partial(jax.jit, static_argnames=("gated", "float_terms", "for_floats"))
def _prepared(
    weights: BipolarArray | BlockScaledArray, gated: bool, float_terms: FloatTerms | None, for_floats: bool
) -> PreparedArray:
    """`weights.prepare`, one layer of a stack after the other, so that what it makes on the way is one layer's."""
    options = {"gated": gated, "float_terms": float_terms, "for_floats": for_floats}
    if weights.ndim == 2:
        return weights.prepare(**options)
    return jax.lax.map(functools.partial(_prepared, **options), weights)


def _in_dtype(model: Transformer, dtype: jnp.dtype) -> Transformer:
    """The model with float parameters and computation in `dtype`; packed weights stay as they are."""
    for _, module in nnx.iter_modules(model):
        for name in ("dtype", "param_dtype"):
            if getattr(module, name, None) is not None:
                setattr(module, name, dtype)
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda variable: _cast(variable, dtype), state, is_leaf=_is_variable))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _cast(variable: nnx.Variable, dtype: jnp.dtype) -> nnx.Variable:
    value = variable.get_value()
    is_float = hasattr(value, "astype") and jnp.issubdtype(getattr(value, "dtype", None), jnp.floating)
    return variable.replace(value.astype(dtype)) if is_float else variable

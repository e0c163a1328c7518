"""Prepares a model for fast generation: joined layers, weights as the device multiplies them, and the dtype."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.inference.join import join_with_reasons
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Packed, fuses
from bipolar_jax.packing import BipolarArray


def prepare_for_inference[Model: (Transformer, PretrainedModel)](
    model: Model, dtype: Any = None, *, unpack: bool | None = None
) -> Model:
    """A copy of the model, ready for `generate`, `stream` and `perplexity`; unchanged arrays are shared.

    Packed layers of the same input are joined (`join_projections`), so that a Hopper GPU can run all layers of a decode
    step as one kernel; float parameters, and what the layers compute in, become `dtype`. On CPUs packed weights become
    one byte each, because taking their bits out of planes in every step costs several times the product. The numbers
    stay the same; weights of n bits take 8 / n times the memory. `explain_model` says which kernels the result runs,
    and why not others. `save_model` takes the model before it is prepared.

    Args:
      model: the model, quantized or not, or with its tokenizer.
      dtype: a float dtype; None takes bfloat16 for float32 models on GPUs, whose fastest kernels take 16-bit floats,
        and else keeps the model's own.
      unpack: whether packed weights become one byte each (`UnpackedArray`); None does so on CPUs. Layers that name
        another backend than XLA stay packed, and Hopper's kernels take packed weights only.

    Raises:
      ValueError: dtype is no float dtype.

    Warns:
      UserWarning: packed layers stay apart, for example because their precisions differ; the message says which and
        why.
    """
    if isinstance(model, PretrainedModel):
        return model.with_model(prepare_for_inference(model.model, dtype, unpack=unpack))
    prepared, reasons = join_with_reasons(model)
    if reasons:
        warnings.warn(f"layers stay apart, which decodes more slowly: {'; '.join(reasons)}", stacklevel=2)
    if dtype is None:
        is_wide = prepared.final_norm.scale.dtype == jnp.float32
        dtype = jnp.bfloat16 if is_wide and default_device().platform == "gpu" else prepared.final_norm.scale.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype, such as bfloat16, got {jnp.dtype(dtype).name}")
    if default_device().platform == "cpu" if unpack is None else unpack:
        _unpack(prepared)
    return _in_dtype(prepared, jnp.dtype(dtype))


def _unpack(model: Transformer) -> None:
    """Unpacks the weights of the layers that XLA multiplies, one layer at a time."""
    for _, layer in list(nnx.iter_modules(model)):
        is_table = isinstance(layer, Embed)
        if not (is_table or fuses(layer)) or layer.implementation not in ("auto", "xla"):
            continue
        weights = layer.embedding if is_table else layer.kernel
        if isinstance(weights.get_value(), BipolarArray):
            setattr(layer, "embedding" if is_table else "kernel", Packed(weights.get_value().unpack()))


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

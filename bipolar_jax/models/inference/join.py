"""Joins layers of the same input into larger products: query, key and value; gate and up."""

from __future__ import annotations

from flax import nnx

from bipolar_jax.models.blocks.feed_forward import SwiGLU
from bipolar_jax.models.transformer import Attention, Transformer
from bipolar_jax.nn import Linear, joined


def join_projections(model: Transformer) -> Transformer:
    """A copy of the model whose packed layers of the same input are joined, where precision and backend agree.

    The numbers stay the same. `save_model` takes the model before it is joined: files store the layers one by one.
    """
    model = nnx.clone(model)
    for module in [module for _, module in nnx.iter_modules(model)]:
        if isinstance(module, Attention):
            _join(module, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        elif isinstance(module, SwiGLU):
            _join(module, ("gate_proj", "up_proj"), "gate_up_proj")
    return model


def _join(module: nnx.Module, names: tuple[str, ...], whole: str) -> None:
    layers = [getattr(module, name, None) for name in names]
    if not all(isinstance(layer, Linear) for layer in layers):
        return
    try:
        layer = joined(layers)
    except ValueError:  # layers that differ, for example in precision, stay apart
        return
    for name in names:
        delattr(module, name)
    setattr(module, whole, layer)

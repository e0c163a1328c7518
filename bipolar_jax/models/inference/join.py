"""Joins layers of the same input into larger products: query, key and value; gate and up."""

from __future__ import annotations

from flax import nnx

from bipolar_jax.models.blocks.feed_forward import GatedMLP
from bipolar_jax.models.transformer import Attention, Transformer
from bipolar_jax.nn import Linear, joined, without_training


def join_projections(model: Transformer) -> Transformer:
    """A copy of the model whose packed layers of the same input are joined, where precision and backend agree.

    The numbers stay the same, but for the roundings of training (`nn.without_training`). `save_model` takes the model
    before it is joined: files store the layers one by one.
    """
    return join_with_reasons(model)[0]


def join_with_reasons(model: Transformer) -> tuple[Transformer, list[str]]:
    """`join_projections`, and one sentence for each group of layers, some of them packed, that stays apart."""
    model, reasons = without_training(model), []
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Attention):
            reason = _join(module, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        elif isinstance(module, GatedMLP):
            reason = _join(module, ("gate_proj", "up_proj"), "gate_up_proj")
        else:
            continue
        if reason is not None:
            reasons.append(f"{'/'.join(map(str, path))}: {reason}")
    return model, reasons


def _join(module: nnx.Module, names: tuple[str, ...], whole: str) -> str | None:
    """Joins the layers if that is possible; says why it is not, if some of them are packed."""
    layers = [getattr(module, name, None) for name in names]
    apart = [name for name, layer in zip(names, layers, strict=True) if not isinstance(layer, Linear)]
    if apart:
        return None if len(apart) == len(names) else f"{', '.join(apart)} is no packed Linear as the others are"
    try:
        layer = joined(layers)
    except ValueError as reason:  # layers that differ, for example in precision, stay apart
        return f"{', '.join(names)}: {reason}"
    for name in names:
        delattr(module, name)
    setattr(module, whole, layer)
    return None

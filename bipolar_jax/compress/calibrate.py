"""Calibration of a model: its layers are rounded one after the other, for the inputs of the packed model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.compress.layer_store import LayerStore, digest_of_array, digest_of_model
from bipolar_jax.compress.packed_sites import SitePlan, packed_kernels, plan_blocks, with_packed_layers
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.nn.compressible import Compressible, layer_at
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.rules import Rules
from bipolar_jax.packing import BipolarArray

DEFAULT_METHOD = Rounding()


def calibrate[Model: Compressible](
    model: Model,
    tokens: Int[np.ndarray | Array, "windows length"],
    rules: Rules,
    *,
    method: Rounding = DEFAULT_METHOD,
    windows_per_step: int = 4,
    on_block: Callable[[int], None] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Model:
    """Copies a model and replaces its float layers by packed layers that are rounded for a text.

    Block by block, and within a block in the order in which they run, the layers of one input are rounded against its
    second moments (`Rounding`, GPTQ by default, arXiv 2210.17323). The inputs are those of the packed model: what runs
    before is packed already, and activations are quantized. For layers that add to the residual stream every token
    counts 1 / mean square of its stream. Layers outside the blocks are rounded as `quantize_model` does it, before.

    In memory are, beside the model and the layers that are finished, the hidden states of all windows, and of one block
    its float layers and second moments. All blocks run the same compiled programs.

    Args:
      model: float or partly packed, see `nn.compressible.Compressible`; it is not changed. Projections must not have
        been joined.
      tokens: token ids, such as text that the model wrote itself: 128 windows of 512 tokens are enough for 4 bits.
      rules: as those of `quantize_model`.
      method: how weights are rounded.
      windows_per_step: windows that run at once; more is faster and takes more memory.
      on_block: called with the number of blocks that are finished.
      store: a folder where finished blocks are kept. A calibration that was stopped resumes from it, with the same
        result; it must be called with the same arguments.

    Returns:
      A model of the same class.

    Raises:
      ValueError: no windows; as `quantize_model`; a layer that was trained with `DotGeneral`; or a store that holds
        blocks of another model, text, rules or method.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or windows_per_step < 1:
        raise ValueError(
            f"needs tokens [windows, length] and at least 1 window a step, got tokens of shape {tokens.shape} and "
            f"{windows_per_step=}"
        )
    if method.asymmetry:
        raise ValueError(f"asymmetry is {method.asymmetry}, but calibrate runs no float model beside: set it to 0")
    plans, other_rules = plan_blocks(model, rules)
    precisions = {name: precision for plan in plans for name, precision in plan.precisions.items()}
    finished = None
    if store is not None:
        of_rules = repr((sorted(precisions.items()), other_rules))
        digests = {"model": digest_of_model(model), "tokens": digest_of_array(tokens)}
        finished = LayerStore(store, digests | {"rules": of_rules, "method": repr(method)})
    if other_rules:
        model = quantize_model(model, other_rules)
    batches = [jnp.asarray(tokens[i : i + windows_per_step]) for i in range(0, len(tokens), windows_per_step)]
    carries = [_enter(model, batch) for batch in batches]
    blocks = []
    for index in range(model.num_blocks):
        block = model.block(index)
        kernels = None if finished is None else finished.read(index)
        if kernels is None:
            block, kernels = _calibrated(model, block, carries, plans, method)
            if finished is not None:
                finished.write(index, kernels)
        else:
            block = with_packed_layers(block, kernels, precisions)
        blocks.append(block)
        if index + 1 < model.num_blocks:
            for each in range(len(carries)):  # one by one, so that old and new states are not all in memory
                carries[each] = _run(model, block, carries[each])
        if on_block is not None:
            jax.block_until_ready(carries[-1])
            on_block(index + 1)
    return model.with_blocks(blocks)


def _calibrated(
    model: Compressible, block: nnx.Module, carries: Sequence[Any], plans: Sequence[SitePlan], method: Rounding
) -> tuple[nnx.Module, dict[str, BipolarArray]]:
    """A block with packed layers, and these layers' kernels by path."""
    kernels: dict[str, BipolarArray] = {}
    for index, plan in enumerate(plans):
        a_bits = tuple(dict.fromkeys(precision.a_bits for precision in plan.precisions.values()))
        if not a_bits:
            continue
        remaining = tuple(each.sites for each in plans[index:])
        inputs = layer_at(block, plan.sites.names[0]).in_features
        moments = tuple(SecondMoments.zeros(inputs) for _ in a_bits)
        for carry in carries:
            moments = _add_moments(model, block, carry, moments, remaining, a_bits)
        hessians = {bits: _hessian(sums) for bits, sums in zip(a_bits, moments, strict=True)}
        rounded = {}
        for precision, names in plan.joined().items():
            floats = [layer_at(block, name).kernel[...] for name in names]
            packed = packed_kernels(floats, hessians[precision.a_bits], precision, method)
            rounded |= dict(zip(names, packed, strict=True))
        block = with_packed_layers(block, rounded, plan.precisions)
        kernels |= rounded
    return block, kernels


@jax.jit
def _enter(model: Compressible, ids: Int[Array, "batch length"]) -> Any:
    return model.enter_blocks(ids)


@jax.jit
def _run(model: Compressible, block: nnx.Module, carry: Any) -> Any:
    return model.run_block(block, carry)


_hessian = jax.jit(SecondMoments.hessian)


@functools.partial(jax.jit, static_argnames=("remaining", "a_bits"), donate_argnames="moments")
def _add_moments(model, block, carry, moments, remaining, a_bits) -> tuple[SecondMoments, ...]:
    """The second moments of the first of the remaining sites, for each number of activation bits, with one batch."""
    x, stream = site_inputs(model, block, carry, remaining)
    stream = stream if remaining[0].to_stream else None
    return tuple(sums.add(x, bits, stream) for sums, bits in zip(moments, a_bits, strict=True))

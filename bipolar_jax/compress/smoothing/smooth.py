"""`smooth`: a model with the same function whose activations are easier to quantize, without rotations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.compress.smoothing.factors import awq_factors, smoothquant_factors
from bipolar_jax.compress.smoothing.method import Smoothing
from bipolar_jax.nn.compressible import Rotatable, Sites, layer_at
from bipolar_jax.quantize import Precision

DEFAULT_METHOD = Smoothing()


def smooth[Model: Rotatable](
    model: Model,
    tokens: Int[np.ndarray | Array, "windows length"],
    precision: Precision | str,
    *,
    method: Smoothing = DEFAULT_METHOD,
    windows_per_step: int = 4,
    on_block: Callable[[int], None] | None = None,
) -> Model:
    """Divides the inputs of layers by factors found on a text, and multiplies the rows of their weights by them.

    The divisors move into what makes the input: the norm before query, key and value, and before gate and up; the value
    layer before the output of attention; up before down, where down's input is proportional to up's output. So the
    function stays the same up to rounding, and nothing is added at run time. It is for models that are not rotated:
    Hadamard rotations spread outliers better, and mix what factors would tell apart.

    Args:
      model: a float model. Its arrays are not changed.
      tokens: token ids of a text.
      precision: that the model will be quantized to; "awq" rounds weights to it.
      method: how factors are chosen.
      windows_per_step: windows that run at once.
      on_block: called with the number of blocks that are finished.

    Raises:
      ValueError: a model that is not `Rotatable`, or rotated, or quantized; no windows, or such as the model cannot
        read.
    """
    precision = Precision.of(precision)
    if not isinstance(method, Smoothing):
        raise ValueError(f"method must be a Smoothing, such as Smoothing('awq'), got {method!r:.60}")
    if not isinstance(model, Rotatable):
        raise ValueError(
            f"a {type(model).__name__} does not say what makes the inputs of its layers: smooth a models.Transformer, "
            "or a model with the methods of nn.compressible.Rotatable"
        )
    if model.rotation is not None:
        raise ValueError("the model is rotated: smooth the model that it was made from, or only rotate")
    shape = np.shape(tokens)
    if len(shape) != 2 or 0 in shape or type(windows_per_step) is not int or windows_per_step < 1:
        raise ValueError(
            f"needs tokens [windows, length] and at least 1 window a step, got {shape}, {windows_per_step!r}"
        )
    model.check_ids(tokens)
    carries = [
        _enter(model, jnp.asarray(tokens[start : start + windows_per_step]))
        for start in range(0, shape[0], windows_per_step)
    ]
    sites, heads = smoothed_sites(model), model.value_heads
    head_size = 0 if heads is None else heads.size
    blocks = []
    for index in range(model.num_blocks):
        block = model.block(index)
        statistics = tuple(None for _ in sites)
        for carry in carries:
            statistics = _add_statistics(model, block, carry, statistics, sites)
        blocks.append(_smoothed(block, statistics, sites, head_size, precision, method))
        if index + 1 < model.num_blocks:
            carries = [_run(model, block, carry) for carry in carries]
        if on_block is not None:
            on_block(index + 1)
    return model.with_blocks(blocks)


def smoothed_sites(model: Rotatable) -> tuple[Sites, ...]:
    """The sites of a block whose divisors something before can take.

    Raises:
      ValueError: one that is not a float `nnx.Linear`.
    """
    sites = tuple(each for each in model.block_sites if each.norm is not None or each.proportional_to is not None)
    for name in (name for each in sites for name in (*each.names, each.proportional_to) if name is not None):
        layer = layer_at(model.block(0), name)
        if not isinstance(layer, nnx.Linear):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, not a float nnx.Linear: smooth a model before it is quantized"
            )
    return sites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Statistics:
    """Of the inputs of a site: largest magnitude, sum of magnitudes, second moments."""

    largest: Float[Array, " k"]
    total: Float[Array, " k"]
    moments: SecondMoments


@jax.jit
def _enter(model: Rotatable, batch: Any) -> Any:
    return model.enter_blocks(batch)


@jax.jit
def _run(model: Rotatable, block: nnx.Module, carry: Any) -> Any:
    return model.run_block(block, carry)


@functools.partial(jax.jit, static_argnames="sites")
def _add_statistics(model, block, carry, statistics, sites) -> tuple[_Statistics, ...]:
    """The statistics of all sites with one batch."""
    added = []
    for each, before in zip(sites, statistics, strict=True):
        remaining = model.block_sites[model.block_sites.index(each) :]
        x, _ = site_inputs(model, block, carry, remaining)
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if before is None:
            zeros = jnp.zeros(x.shape[-1], jnp.float32)
            before = _Statistics(zeros, zeros, SecondMoments.zeros(x.shape[-1]))
        magnitude = jnp.abs(x)
        largest = jnp.maximum(before.largest, magnitude.max(axis=0))
        added.append(_Statistics(largest, before.total + magnitude.sum(axis=0), before.moments.add(x, None)))
    return tuple(added)


@functools.partial(jax.jit, static_argnames=("sites", "head_size", "precision", "method"))
def _smoothed(block, statistics, sites: Sequence[Sites], head_size: int, precision, method: Smoothing) -> nnx.Module:
    """The block with factors between its layers."""
    block = nnx.clone(block)
    for each, found in zip(sites, statistics, strict=True):
        layers = [layer_at(block, name) for name in each.names]
        w = jnp.concatenate([layer.kernel[...].astype(jnp.float32) for layer in layers], axis=1)
        maker = layer_at(block, each.norm or each.proportional_to)
        count = len(w) if each.norm is not None else maker.out_features
        owners = owners_of(len(w), count, head_size)
        if method.algorithm == "smoothquant":
            factors = smoothquant_factors(found.largest, w, method.alpha, owners, count)
        else:
            mean = found.total / jnp.maximum(found.moments.weight, 1)
            factors = awq_factors(mean, w, found.moments.hessian(), precision, method.steps, owners, count)
        for layer in layers:
            _scale(layer, "kernel", factors[owners][:, None])
        for name in ("scale", "bias") if each.norm is not None else ("kernel", "bias"):
            _scale(maker, name, 1 / factors)  # along the last axis
    return block


def owners_of(inputs: int, outputs: int, head_size: int) -> Int[Array, " inputs"]:
    """Which output makes each input: the same of both, or of heads that `inputs // outputs` consecutive heads share."""
    index = jnp.arange(inputs)
    if inputs == outputs:
        return index
    head, number = index // head_size, index % head_size
    return head // (inputs // outputs) * head_size + number


def _scale(layer: nnx.Module, name: str, factors: Float[Array, "..."]) -> None:
    """Multiplies an array of a layer, if it has it; in float32, back to its dtype."""
    variable = getattr(layer, name, None)
    if variable is not None:
        array = variable[...]
        factors = factors.reshape((1,) * (array.ndim - factors.ndim) + factors.shape)
        setattr(layer, name, variable.replace((array.astype(jnp.float32) * factors).astype(array.dtype)))

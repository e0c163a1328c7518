"""The weights of a block learn together, so that its output comes near to that of the float model's block.

BRECQ (arXiv 2102.05426) on the grids, codes and steps of Block-AP in EfficientQAT (arXiv 2407.11062): the packed
block gets what the packed blocks before it put out, and learns the residual stream that the float block makes of the
same, or the one that the float model has after it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.hessians import stream_weights
from bipolar_jax.compress.packed_sites import BlockPlan, float_matrix
from bipolar_jax.compress.programs import Run, call
from bipolar_jax.compress.reconstruction import learned_grid
from bipolar_jax.compress.reconstruction.learned_grid import LearnedRows, StartGrid
from bipolar_jax.compress.reconstruction.method import Reconstruction
from bipolar_jax.compress.rounded_layers import with_rounded_layers
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.rounding.method import Grid
from bipolar_jax.format import BipolarFormat
from bipolar_jax.nn.compressible import Compressible, layer_at
from bipolar_jax.packing import BipolarArray

# Adam (arXiv 1412.6980); gradients of single codes are far below its usual epsilon, 1e-8.
_ADAM = optax.scale_by_adam(0.9, 0.95, eps=1e-12)


class Layer(NamedTuple):
    """What is static of a layer that learns: its path in the block, its groups and the grid of its activations."""

    name: str
    group_size: int | None
    a_format: BipolarFormat | None


class State(NamedTuple):
    """What an update changes: the rows of all layers, and Adam's means."""

    learned: list[LearnedRows]
    adam: optax.ScaleByAdamState


def check_reconstruction(model: Any, method: Reconstruction, rounding: Rounding, cache_bits: int | None) -> None:
    """Raises ValueError for what is not reconstructed: other things than blocks, nested codes, caches of few bits."""
    if not isinstance(method, Reconstruction):
        raise ValueError(f"reconstruction must be a Reconstruction or None, got {method!r:.60}")
    if not isinstance(model, Compressible):
        raise ValueError(f"a {type(model).__name__} has no blocks to reconstruct: leave reconstruction None")
    if rounding.nested:
        raise ValueError(f"codes that serve {rounding.nested} bits, too, would lose that: leave reconstruction None")
    if cache_bits is not None:
        raise ValueError(
            f"keys of a cache of {cache_bits} bits have no gradients: leave cache_bits or reconstruction None"
        )


def reconstructed(
    model: Compressible,
    block: nnx.Module,
    carries: Sequence[Any],
    targets: Sequence[Float[Array, "batch length hidden"]],
    kernels: Mapping[str, BipolarArray],
    plan: BlockPlan,
    method: Reconstruction,
    grid: Grid,
    run: Run = call,
) -> dict[str, BipolarArray] | None:
    """The packed kernels of a block's layers after they have learned; None if the last epoch's loss is no lower.

    Args:
      model: runs the block.
      block: the float block.
      carries: the block's, of the packed model; a batch of windows each.
      targets: the residual streams that it learns, one of each batch.
      kernels: the kernels as rounding made them, by path.
      plan: what is done with the block's sites.
      method: rates and epochs.
      grid: of the rounding; zero keeps its place on grids that have it.
      run: calls a program, or compiles it, see `compress.programs`.
    """
    precisions = {name: precision for sites in plan for name, precision in sites.precisions.items()}
    layers = tuple(Layer(name, precisions[name].group_size, precisions[name].a_format) for name in kernels)
    matrices = functools.partial(_float_matrices, names=tuple(kernels))
    floats = matrices(block) if run is call else jax.eval_shape(matrices, block)
    starts, state = run(
        _start, list(kernels.values()), floats, learn_groups=method.learn_groups, keeps_zero=grid != "free"
    )
    losses = []
    for batch, decay in method.updates(len(carries)):
        rates = np.asarray([method.code_rate * decay, method.grid_rate * decay], np.float32)
        state, loss = run(update, model, block, carries[batch], targets[batch], starts, state, rates, layers=layers)
        losses.append(loss)
        if run is not call:
            break
    formats = tuple((kernel.format, kernel.offset is not None) for kernel in kernels.values())
    packed = run(_packed, starts, state.learned, layers=layers, formats=formats)
    if run is call:
        before, after = (float(jnp.mean(jnp.stack(each))) for each in (losses[: len(carries)], losses[-len(carries) :]))
        if not after < before:  # NaN, too
            return None
    return dict(zip(kernels, packed, strict=True))


def _float_matrices(block: nnx.Module, names: tuple[str, ...]) -> list[Float[Array, "k n"]]:
    return [float_matrix(layer_at(block, name)) for name in names]


def stream_loss(stream: Float[Array, "*batch hidden"], target: Float[Array, "*batch hidden"]) -> Float[Array, ""]:
    """The mean over tokens of the squared error, in parts of the target's square: a norm follows the stream."""
    target = target.astype(jnp.float32).reshape(-1, target.shape[-1])
    error = jnp.mean((stream.astype(jnp.float32).reshape(target.shape) - target) ** 2, axis=-1)
    return jnp.mean(error * stream_weights(target))


@functools.partial(jax.jit, static_argnames="layers", donate_argnames="state")
def update(
    model: Compressible,
    block: nnx.Module,
    carry: Any,
    target: Float[Array, "batch length hidden"],
    starts: list[StartGrid],
    state: State,
    rates: Float[Array, "2"],
    layers: tuple[Layer, ...],
) -> tuple[State, Float[Array, ""]]:
    """One update by Adam, and the loss before it. `rates` are that of codes and that of the grid."""

    def loss(learned):
        return stream_loss(model.stream(model.run_block(learned_block(block, starts, learned, layers), carry)), target)

    value, gradient = jax.value_and_grad(loss)(state.learned)
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to an int32
        moves, adam = _ADAM.update(gradient, state.adam)

    def moved(path, number, move):
        return number - (rates[0] if path[-1].name == "codes" else rates[1]) * move

    learned = jax.tree.map_with_path(moved, state.learned, moves)
    learned = [rows.within_cells(start.largest) for start, rows in zip(starts, learned, strict=True)]
    return State(learned, adam), value


def learned_block(
    block: nnx.Module, starts: list[StartGrid], learned: list[LearnedRows], layers: tuple[Layer, ...]
) -> nnx.Module:
    """The block with the rounded weights as they have become."""
    matrices = {
        layer.name: learned_grid.numbers(start, rows, layer.group_size).T
        for layer, start, rows in zip(layers, starts, learned, strict=True)
    }
    return with_rounded_layers(block, matrices, {layer.name: layer.a_format for layer in layers})


@functools.partial(jax.jit, static_argnames=("learn_groups", "keeps_zero"))
def _start(kernels, floats, learn_groups, keeps_zero) -> tuple[list[StartGrid], State]:
    starts = [StartGrid.of(kernel) for kernel in kernels]
    learned = [
        LearnedRows.of(*each, learn_groups=learn_groups, keeps_zero=keeps_zero)
        for each in zip(kernels, floats, starts, strict=True)
    ]
    return starts, State(learned, _ADAM.init(learned))


@functools.partial(jax.jit, static_argnames=("layers", "formats"))
def _packed(starts, learned, layers, formats) -> list[BipolarArray]:
    return [
        learned_grid.packed(start, rows, number_format, layer.group_size, has_offset=has_offset)
        for start, rows, layer, (number_format, has_offset) in zip(starts, learned, layers, formats, strict=True)
    ]

"""What a model loses if the layers of one input are packed, and all others stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from bipolar_jax.compress.block_programs import enter_blocks, run_block
from bipolar_jax.compress.rounded_layers import numbers_of_kernels, with_rounded_layers
from bipolar_jax.compress.site_inputs import replace_layer
from bipolar_jax.nn.compressible import Predictive, Sites, layer_at
from bipolar_jax.nn.layers.linear import Linear

# Losses of the sites of a block, and of all of them at once, for every option.
BlockLosses = Float[np.ndarray, "sites options"]


def site_losses(
    model: Predictive,
    options: Sequence[Predictive],
    tokens: Int[np.ndarray, "windows length"],
    *,
    windows_per_step: int = 4,
    known: Mapping[int, BlockLosses] | None = None,
    on_block: Callable[[int, BlockLosses], None] | None = None,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "blocks sites options"]:
    """Mean Kullback-Leibler divergence of the next token's distribution, for each block, site and option.

    It is that of the model with the packed layers of one option at one site of one block, from the float model: how
    much the logarithm of the perplexity rises on text that the float model writes. A float model has it exactly 0, and
    unlike the rise of the loss on given tokens it has little noise, so that some windows are enough.

    Args:
      model: float, in the basis (`rotate`) that the options have.
      options: the model packed differently, for example by `calibrate`; projections are not joined.
      tokens: text.
      windows_per_step: windows that run at once.
      known: losses of blocks of an earlier call, which are not measured again.
      on_block: called with the index of a block and its losses, as soon as they are measured.
      mesh: devices that divide the windows of each step between them, whatever their axes; each has all weights. Losses
        are those of one device but for the rounding of float sums. None is one device.

    Raises:
      ValueError: windows of a step that do not divide over the mesh.
    """
    batches = [tokens[start : start + windows_per_step] for start in range(0, len(tokens), windows_per_step)]
    if mesh is None:
        batches = list(map(jnp.asarray, batches))
    else:
        model, options, batches = _placed(model, options, batches, mesh)
    blocks = [model.block(index) for index in range(model.num_blocks)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    carries = [enter_blocks(model, batch, None) for batch in batches]
    counts = np.array(list(map(len, batches)), np.float64)
    losses = []
    for index, block in enumerate(blocks):
        found = None if known is None else known.get(index)
        if found is None:
            sums = np.zeros((len(model.block_sites), len(options)))
            variants = _variants(block, options, index, model.block_sites)
            for carry, count in zip(carries, counts, strict=True):
                wanted = _log_probabilities(model, stack, index, carry)
                for at, variant in variants.items():
                    after = run_block(model, variant, carry)
                    sums[at] += count * float(_divergence(model, stack, index + 1, after, wanted))
            found = sums / counts.sum()
            if on_block is not None:
                on_block(index, found)
        losses.append(found)
        if index + 1 < len(blocks):
            carries = [run_block(model, block, carry) for carry in carries]
    return np.stack(losses)


def _placed(
    model: Predictive, options: Sequence[Predictive], batches: list[Int[np.ndarray, "_ length"]], mesh: Mesh
) -> tuple[Predictive, Sequence[Predictive], list[Int[Array, "_ length"]]]:
    """The models, whole on every device of a mesh, and the windows of each step, divided over its devices."""
    for batch in batches:
        if len(batch) % mesh.size:
            raise ValueError(
                f"a step of {len(batch)} windows does not divide over {mesh.size} devices: make windows_per_step, and "
                f"the {sum(map(len, batches))} windows, multiples of {mesh.size}"
            )
    axes = mesh.axis_names
    mesh = Mesh(mesh.devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    model, options = jax.device_put((model, list(options)), NamedSharding(mesh, PartitionSpec()))
    return model, options, jax.device_put(batches, NamedSharding(mesh, PartitionSpec(axes)))


def _variants(
    block: nnx.Module, options: Sequence[Predictive], index: int, sites: Sequence[Sites]
) -> dict[tuple[int, int], nnx.Module]:
    """The block with the packed layers of each site of each option, or with such as compute the same.

    Those of all options with the same activations share a program, see `rounded_layers`.
    """
    variants = {}
    for option, packed_model in enumerate(options):
        packed = packed_model.block(index)
        for site, each in enumerate(sites):
            layers = {name: layer_at(packed, name) for name in each.names}
            rounded = {name: layer for name, layer in layers.items() if isinstance(layer, Linear) and not each.experts}
            kernels = numbers_of_kernels([layer.kernel.get_value() for layer in rounded.values()])
            a_formats = {name: layer.precision.a_format for name, layer in rounded.items()}
            variant = with_rounded_layers(block, dict(zip(rounded, kernels, strict=True)), a_formats)
            for name in layers.keys() - rounded.keys():
                replace_layer(variant, name, layers[name])
            variants[site, option] = variant
    return variants


def _rest(model: Predictive, stack: nnx.Module, start: Int[Array, ""], carry: Any) -> Float[Array, "windows length v"]:
    """Log-probabilities of next tokens after the float blocks from `start` on."""
    count = len(jax.tree.leaves(stack)[0])

    def step(index, carry):
        return model.run_block(jax.tree.map(lambda leaf: leaf[index], stack), carry)

    return jax.nn.log_softmax(model.predict(jax.lax.fori_loop(start, count, step, carry)))


_log_probabilities = jax.jit(_rest)


@jax.jit
def _divergence(model: Predictive, stack: nnx.Module, start: Int[Array, ""], carry: Any, wanted) -> Float[Array, ""]:
    found = _rest(model, stack, start, carry)
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1))

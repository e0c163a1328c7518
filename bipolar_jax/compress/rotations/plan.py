"""What is done to each layer of a model, decided from what it says of itself; no numbers are computed here."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
from flax import nnx
from jax import random
from jaxtyping import PRNGKeyArray

from bipolar_jax.nn.compressible import Rotatable, Rotation, Sites, ValueHeads, layer_at
from bipolar_jax.ops import Hadamard, hadamard

Kind = Literal["full", "foldable", "none"]


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """What is done to a linear layer, in this order.

    Attributes:
      norm: path of the norm whose gain and bias it takes over, or None.
      inputs: rotations of its input, one after the other.
      centred: whether the mean of its outputs is left out.
      outputs: rotations of its output.
    """

    norm: str | None = None
    inputs: tuple[Hadamard, ...] = ()
    centred: bool = False
    outputs: tuple[Hadamard, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to a model.

    Attributes:
      rotation: what the model has to know of it.
      block: what is done to the linear layers of a block, by their paths.
      tables: whether the tables of the stream's beginning are centred, and rotated by `rotation.stream`.
      centred: whether the model has LayerNorms, so that the stream loses its mean.
    """

    rotation: Rotation
    block: dict[str, LayerChange]
    tables: bool
    centred: bool


def make_plan(model: Rotatable, kind: Kind, key: PRNGKeyArray, shards: int = 1, block: int | None = None) -> Plan:
    """The plan for `rotate`. Raises ValueError as that does."""
    if kind not in get_args(Kind):
        raise ValueError(f"rotation must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not isinstance(key, jax.Array):
        raise ValueError(f"key must be a PRNG key such as jax.random.key(0), got {key!r:.40}")
    if model.rotation is not None:
        raise ValueError("the model is rotated already: rotate the model that it was made from")
    first = model.block(0)
    _check_sites(first, model.block_sites)
    ends, norms = model.stream_ends, [layer_at(first, sites.norm) for sites in model.block_sites if sites.norm]
    centred = any(isinstance(norm, nnx.LayerNorm) for norm in norms)
    stream = _stream_rotation(first, model.block_sites, key)
    ffn = keys = None
    if kind == "full" and model.inner is not None:
        ffn = hadamard(layer_at(first, model.inner).in_features, shards, block=block)
    if kind == "full" and model.value_heads is not None:
        keys = hadamard(model.value_heads.size)
    rotation = Rotation(
        stream=stream,
        enters=ends.output is None or not ends.enters_as_is,
        leaves=ends.output is None or isinstance(layer_at(model, ends.norm), nnx.LayerNorm),
        ffn=ffn,
        keys=keys,
    )
    changes = _block_changes(first, model.block_sites, model.value_heads, rotation, centred)
    if ffn is not None:
        changes[model.inner] = dataclasses.replace(changes[model.inner], inputs=(ffn,))
    return Plan(rotation, changes, not rotation.enters, centred)


def _check_sites(block: nnx.Module, all_sites: tuple[Sites, ...]) -> None:
    """Raises ValueError unless the block is a float one that adds its outputs to the stream as they are."""
    for sites in all_sites:
        if sites.experts:
            raise ValueError(
                f"{', '.join(sites.names)} are experts, whose router reads the residual stream in its own basis: leave "
                "the model as it is, and calibrate it"
            )
        if sites.output_norm is not None:
            raise ValueError(
                f"the norm {sites.output_norm} follows {', '.join(sites.names)}, before the sum with the residual "
                "stream: its gain is tied to one basis, so the stream cannot be rotated"
            )
        for name in sites.names:
            if not isinstance(layer_at(block, name), nnx.Linear):
                kind = type(layer_at(block, name)).__name__
                raise ValueError(f"{name} is a {kind}, not a float nnx.Linear: rotate a model before it is quantized")


def _stream_rotation(block: nnx.Module, all_sites: tuple[Sites, ...], key: PRNGKeyArray) -> Hadamard:
    """R1: random signs times Hadamard matrices, of the numbers that the block adds to the stream."""
    sizes = {layer_at(block, name).out_features for sites in all_sites if sites.to_stream for name in sites.names}
    if len(sizes) != 1:
        raise ValueError(f"layers that add to one residual stream have {sorted(sizes)} outputs")
    return hadamard(sizes.pop(), signs=int(random.bits(key, dtype="uint32")))


def _block_changes(
    block: nnx.Module,
    all_sites: tuple[Sites, ...],
    heads: ValueHeads | None,
    rotation: Rotation,
    centred: bool,
) -> dict[str, LayerChange]:
    """R1 and R2 by the paths of the layers."""
    changes = {}
    for sites in all_sites:
        reads = (rotation.stream,) if sites.norm is not None else ()
        writes = (rotation.stream,) if sites.to_stream else ()
        change = LayerChange(sites.norm, reads, centred and sites.to_stream, writes)
        changes |= dict.fromkeys(sites.names, change)
    if heads is not None:
        value, output = changes[heads.value], changes[heads.output]
        made = _each_head(heads.size, layer_at(block, heads.value).out_features)
        summed = _each_head(heads.size, layer_at(block, heads.output).in_features)
        changes[heads.value] = dataclasses.replace(value, outputs=(*value.outputs, made))
        changes[heads.output] = dataclasses.replace(output, inputs=(*output.inputs, summed))
    return changes


def _each_head(size: int, numbers: int) -> Hadamard:
    """R2: the same rotation of every head."""
    one = hadamard(size)
    return dataclasses.replace(one, blocks=one.blocks * (numbers // size))

"""`rotate`: a model in another basis, with the same function and fewer outliers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8, PRNGKeyArray

from bipolar_jax.compress.rotations.fold import (
    Affine,
    centre,
    centre_outputs,
    fold_gain,
    rotate_inputs,
    rotate_outputs,
)
from bipolar_jax.compress.rotations.plan import Kind, LayerChange, Plan, make_plan
from bipolar_jax.nn.compressible import Rotatable, layer_at


def rotate[Model: Rotatable](
    model: Model, rotation: Kind = "full", *, key: PRNGKeyArray, shards: int = 1, block: int | None = None
) -> Model:
    """A model with the same function whose weights and activations have fewer outliers, to be quantized afterwards.

    Gains and biases of norms move into the layers that follow, and LayerNorms within blocks become RMSNorms. Then are
    rotated, by the names of SpinQuant (arXiv 2405.16406) and with the matrices of QuaRot (arXiv 2404.00456):

    - R1, the residual stream, by random signs and a Hadamard matrix, in the weights. Only at the ends of the stream it
      can be left to run time: a tied embedding stays as it is, and hidden states are rotated after the lookup and back
      before the last norm; so they are where a norm follows the embedding, and before a last LayerNorm.
    - R2, heads of values, in the weights.
    - R3, heads of queries and keys, at run time, and only where keys are cached in 4 bits.
    - R4, the input of the feed-forward block's last layer, at run time.

    Rotate models in float32: new weights are rounded to the model's dtype.

    Args:
      model: a float model. Its arrays are not changed.
      rotation: "full"; "foldable", R1 and R2 alone, so that blocks run the same kernels as before; or "none", which
        returns the model.
      key: of R1's random signs. What they are stands in the result's config, so files need nothing else.
      shards: parts that the feed-forward block's inner numbers are divided into, for tensor parallelism: R4 then
        mixes no numbers of two parts.
      block: numbers that R4 mixes; None takes the most that known matrices allow. Kernels rotate powers of two up to
        256 while they quantize, and keep all layers of a token in one kernel; XLA rotates other blocks before.

    Raises:
      ValueError: an unknown rotation; a model that is not `Rotatable`, or rotated or quantized already; a block with a
        norm between a layer and the stream, or with a norm's bias before a layer without one; shards or a block that
        do not divide the numbers.
    """
    if rotation == "none":
        return model
    if not isinstance(model, Rotatable):
        raise ValueError(
            f"a {type(model).__name__} does not say where its residual stream is: rotate a models.Transformer, or a "
            "model with the methods of nn.compressible.Rotatable"
        )
    plan = make_plan(model, rotation, key, shards, block)
    rotated = model.with_rotation(plan.rotation)
    rotated = rotated.with_blocks([_rotated_block(model, rotated, index, plan) for index in range(model.num_blocks)])
    _rotate_ends(rotated, plan)
    return rotated


def _rotated_block(model: Rotatable, rotated: Rotatable, index: int, plan: Plan) -> nnx.Module:
    """A block of the rotated model: its structure is that of `rotated`, its numbers come from `model`."""
    source, block = model.block(index), rotated.block(index)
    for path, change in plan.block.items():
        norm = None if change.norm is None else layer_at(source, change.norm)
        _set(layer_at(block, path), _change(_affine(layer_at(source, path)), _gain(norm), change))
    for path in {change.norm for change in plan.block.values() if change.norm is not None}:
        norm = layer_at(block, path)
        norm.scale = norm.scale.replace(jnp.ones_like(norm.scale[...]))
    return block


def _rotate_ends(model: Rotatable, plan: Plan) -> None:
    """Rotates the tables at the beginning of the stream and the layer at its end, where they can be.

    The model gets new variables: it shares the old ones with the model that it was made from.
    """
    ends, stream = model.stream_ends, plan.rotation.stream
    if plan.tables:
        for path in ends.tables:
            table = layer_at(model, path)
            rows = table.embedding[...].astype(jnp.float32)
            rows = stream.rotate(centre(rows) if plan.centred else rows)
            table.embedding = table.embedding.replace(rows.astype(table.embedding.dtype))
    if not plan.rotation.leaves:
        norm, output = layer_at(model, ends.norm), layer_at(model, ends.output)
        _set(output, _change(_affine(output), _gain(norm), LayerChange(inputs=(stream,))))
        norm.scale = norm.scale.replace(jnp.ones_like(norm.scale[...]))


Gain = tuple[Float[Array, " k"], Float[Array, " k"] | None] | None


def _change(layer: Affine, norm: Gain, change: LayerChange) -> Affine:
    """The arrays of a layer after its change; one program serves all signs."""
    signs = [[each.drawn_signs() for each in rotations] for rotations in (change.inputs, change.outputs)]
    inputs, outputs = (
        tuple(dataclasses.replace(each, signs=None) for each in rotations)
        for rotations in (change.inputs, change.outputs)
    )
    return _change_with_signs(
        layer, norm, signs, change=dataclasses.replace(change, norm=None, inputs=inputs, outputs=outputs)
    )


@functools.partial(jax.jit, static_argnames="change")
def _change_with_signs(
    layer: Affine, norm: Gain, signs: list[list[Int8[Array, " k"] | None]], change: LayerChange
) -> Affine:
    """`signs` are those of the change's rotations of inputs, and of outputs."""
    inputs, outputs = (
        [dataclasses.replace(each, signs=own) for each, own in zip(rotations, own_signs, strict=True)]
        for rotations, own_signs in zip((change.inputs, change.outputs), signs, strict=True)
    )
    if norm is not None:
        layer = fold_gain(layer, *norm)
    for each in inputs:
        layer = rotate_inputs(layer, each)
    if change.centred:
        layer = centre_outputs(layer)
    for each in outputs:
        layer = rotate_outputs(layer, each)
    return layer


def _gain(norm: Any) -> Gain:
    """Gain and bias of a norm, float32."""
    if norm is None:
        return None
    bias = getattr(norm, "bias", None)
    return norm.scale[...].astype(jnp.float32), None if bias is None else bias[...].astype(jnp.float32)


def _affine(layer: nnx.Linear) -> Affine:
    bias = None if layer.bias is None else layer.bias[...].astype(jnp.float32)
    return Affine(layer.kernel[...].astype(jnp.float32), bias)


def _set(layer: nnx.Linear, arrays: Affine) -> None:
    """Gives a layer these arrays, in its dtype."""
    layer.kernel = layer.kernel.replace(arrays.kernel.astype(layer.kernel.dtype))
    if arrays.bias is not None:
        layer.bias = layer.bias.replace(arrays.bias.astype(layer.bias.dtype))

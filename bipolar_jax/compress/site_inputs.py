"""The numbers that enter the linear layers of a block, read by stand-ins for these layers.

Within one trace the layers of a `Sites` are replaced by recorders, and the trace returns what was recorded: XLA then
drops all that the recorded inputs do not depend on. So no model has to say how its blocks compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.compressible import Compressible, Sites, layer_at
from bipolar_jax.nn.convert.layer_paths import LayerReference
from bipolar_jax.nn.layers.experts import ExpertBlocks, run_experts
from bipolar_jax.nn.layers.linear import sizes
from bipolar_jax.ops import Activation


class ExpertInputs(NamedTuple):
    """What enters a stack of experts: the rows of all blocks, zeros where they are empty; and whose they are."""

    rows: Float[Array, "blocks rows k"]
    blocks: ExpertBlocks


class StandIn(nnx.Module):
    """Takes a layer's place in a block.

    Attributes:
      layer: the linear layer.
    """

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """What a model reads of the layer, such as its number of outputs."""
        if name.startswith("_") or name == "layer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.layer, name)


class Recorder(StandIn):
    """Stands in for a linear layer: it hands its input to `record`, and puts out what the layer does, or zeros.

    It is no packed layer, so blocks give it what float layers get: the numbers after the norm or the activation, in the
    model's dtype. Packed layers quantize the same numbers before they are rounded to that dtype.

    Attributes:
      layer: the linear layer.
      record: called with each input.
      zeros: whether it puts out zeros of the layer's shape and dtype, so that nothing is added to the stream. Where
        the layer runs again, its next input may depend on what it put out, which then must not be zeros.
    """

    def __init__(self, layer: nnx.Module, record: Callable[[Array | ExpertInputs], None], *, zeros: bool):
        super().__init__(layer)
        self.record = record
        self.zeros = zeros

    def __call__(self, inputs: Float[Array, "..."], **options: Any) -> Float[Array, "..."]:
        """layer(inputs), or zeros in its place."""
        self.record(inputs)
        return self._put_out(lambda x: self.layer(x, **options), inputs)

    def run_experts(
        self, x: Float[Array, "blocks rows k"], blocks: ExpertBlocks, activation: Activation | None
    ) -> Float[Array, "blocks rows n"]:
        """The same where the layer is a stack of experts, see `nn.layers.experts.RunsExperts`."""
        self.record(ExpertInputs(x, blocks))
        return self._put_out(lambda x: run_experts(self.layer, x, blocks, activation=activation), x)

    def _put_out(self, layer: Callable[[Array], Array], x: Array) -> Array:
        if not self.zeros:
            return layer(x)
        put_out = jax.eval_shape(layer, x)
        return jnp.zeros(put_out.shape, put_out.dtype)


def site_inputs(
    model: Compressible, block: nnx.Module, carry: Any, sites: Sequence[Sites]
) -> tuple[Float[Array, "..."] | ExpertInputs, Any]:
    """The input of the first of the `sites`, and the residual stream that its output is added to.

    Both are those of the block as it is: layers that run before are packed already, or float. The inputs of a layer
    that runs several times are joined as rows; those of experts have the tokens that go to each. Call it in `jax.jit`.

    Args:
      model: runs the block.
      block: one block of the model.
      carry: the block's.
      sites: those of `model.block_sites` that have not been packed, in their order.

    Raises:
      ValueError: the block has no such layer, or does not run it.
    """
    recorded: list[Any] = []
    block = nnx.clone(block)
    first = sites[0].names[0]
    for each in sites:
        for name in each.names:
            if each.to_stream or each is sites[0]:
                record = recorded.append if name == first else _ignore
                replace_layer(block, name, Recorder(layer_at(block, name), record, zeros=each.to_stream))
    # Layers that add to the stream from here on put out zeros: what the block returns is the stream at this point.
    stream = model.stream(model.run_block(block, carry))
    if not recorded:
        raise ValueError(f"the block, a {type(block).__name__}, does not run {first}: leave it out of its sites")
    if len(recorded) == 1:
        return recorded[0], stream
    k = math.prod(sizes(layer_at(block, first).in_features))  # a layer may be given inputs of several ranks
    return jnp.concatenate([x.reshape(-1, k) for x in recorded]), stream


def replace_layer(block: nnx.Module, path: str, layer: nnx.Module) -> None:
    """Puts a layer at a path such as "attention/q_proj", in place. Raises ValueError if there is none."""
    replaced = layer_at(block, path)
    *parents, name = path.split("/")
    parent = layer_at(block, "/".join(parents)) if parents else block
    if isinstance(parent, nnx.List | list):
        key = int(name)
    else:
        key = next(key for key in parent if str(key) == name) if isinstance(parent, dict) else name
    LayerReference(path, parent, key, replaced).replace(layer)


def _ignore(x: Array | ExpertInputs) -> None:
    del x

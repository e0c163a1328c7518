"""Which layers of a block are packed at which precision; and packed layers made of float ones and rounded rows."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.rounding import Rounding, round_rows
from bipolar_jax.compress.site_inputs import replace_layer
from bipolar_jax.nn.compressible import Compressible, Sites, layer_at
from bipolar_jax.nn.convert.float_layers import float_layers
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.rules import Rules, chosen_precision
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.packing import BipolarArray, from_codes
from bipolar_jax.quantize import Precision


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """What is done with the layers of one input.

    Attributes:
      sites: the layers.
      precisions: of each layer by its path within a block; layers that stay as they are, are missing.
    """

    sites: Sites
    precisions: Mapping[str, Precision]

    def joined(self) -> dict[Precision, tuple[str, ...]]:
        """The layers of each precision, which are rounded together."""
        return {
            precision: tuple(name for name, found in self.precisions.items() if found == precision)
            for precision in dict.fromkeys(self.precisions.values())
        }


def plan_blocks(model: Compressible, rules: Rules) -> tuple[tuple[SitePlan, ...], list[tuple[str, Precision]]]:
    """What the rules say of the sites of a block; and rules for all other layers, each by its whole path.

    Nothing is computed.

    Raises:
      ValueError: as `quantize_model`; or a site that is not a float `nnx.Linear`, or was trained with `DotGeneral`.
    """

    def block_of(model):
        return quantize_model(model, rules).block(0)

    packed, block = jax.eval_shape(block_of, model), jax.eval_shape(lambda model: model.block(0), model)
    plans = []
    for sites in model.block_sites:
        precisions = {}
        for name in sites.names:
            before, after = layer_at(block, name), layer_at(packed, name)
            if type(before) is type(after):
                continue
            if not isinstance(before, nnx.Linear):
                raise ValueError(f"{name} is a {type(before).__name__}, not an nnx.Linear: leave it out of the rules")
            if after.trained is not None:
                raise ValueError(f"{name} was trained with DotGeneral: pack such models with quantize_model")
            precisions[name] = after.precision
        plans.append(SitePlan(sites, precisions))
    rest = jax.eval_shape(lambda model: model.with_blocks([block_of(model)] * model.num_blocks), model)
    others = {layer.path: chosen_precision(rules, layer.path) for layer in float_layers(rest) if layer.reason is None}
    return tuple(plans), [(f"^{re.escape(path)}$", each) for path, each in others.items() if each is not None]


@functools.partial(jax.jit, static_argnames=("precision", "method"))
def packed_kernels(
    kernels: Sequence[Float[Array, "k _"]], hessian: Float[Array, "k k"], precision: Precision, method: Rounding
) -> list[BipolarArray]:
    """Rounds the kernels of layers with one input, as one matrix, and packs each."""
    rows = jnp.concatenate([kernel.astype(jnp.float32).T for kernel in kernels])
    rounded = round_rows(rows, hessian, precision, method)
    packed, start = [], 0
    for kernel in kernels:
        part = jax.tree.map(lambda leaf, at=start, n=kernel.shape[1]: leaf[at : at + n], rounded)
        start += kernel.shape[1]
        group_size = precision.group_size
        packed.append(from_codes(part.codes.T, precision.w_bits, -2, part.scale, part.offset, group_size, part.groups))
    return packed


def with_packed_layers(
    block: nnx.Module, kernels: Mapping[str, BipolarArray], precisions: Mapping[str, Precision]
) -> nnx.Module:
    """A copy of the block with packed layers in place of the float ones of these paths."""
    block = nnx.clone(block)
    for name, kernel in kernels.items():
        replace_layer(block, name, packed_layer(layer_at(block, name), kernel, precisions[name]))
    return block


def packed_layer(layer: nnx.Linear, kernel: BipolarArray, precision: Precision) -> Linear:
    """The packed layer for a float one, with this kernel; it shares the bias.

    Its precision names a calibration that gives kernels of this structure, with offsets or without, because files
    restore the structure of a layer from its precision.
    """
    has_offset = kernel.offset is not None
    if kernel.groups is None and has_offset != (precision.calibration == "minmax"):
        precision = dataclasses.replace(precision, calibration="minmax" if has_offset else "absmax")
    packed = Linear(
        layer.in_features,
        layer.out_features,
        precision=precision,
        use_bias=False,
        kernel=kernel,
        dtype=layer.dtype,
        param_dtype=layer.kernel[...].dtype,
        promote_dtype=layer.promote_dtype,
        preferred_element_type=layer.preferred_element_type,
    )
    packed.bias = nnx.data(layer.bias)
    packed.kernel = Packed(kernel)
    return packed

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

from bipolar_jax.compress.expert_moments import expert_hessians
from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.compress.programs import Run, call
from bipolar_jax.compress.rounding import RoundedRows, Rounding
from bipolar_jax.compress.rounding.round_rows import round_in_stages
from bipolar_jax.compress.site_inputs import replace_layer
from bipolar_jax.nn.compressible import Compressible, Sites, layer_at
from bipolar_jax.nn.convert.float_layers import float_layers
from bipolar_jax.nn.convert.layer_runs import names_of_layers
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.rules import Rules, chosen_precision
from bipolar_jax.nn.layers.dense_layout import axes_of, folded_kernel
from bipolar_jax.nn.layers.linear import Linear
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


# What is done with the sites of a block, in order.
BlockPlan = tuple[SitePlan, ...]


def plan_blocks(model: Compressible, rules: Rules) -> tuple[tuple[BlockPlan, ...], list[tuple[str, Precision]]]:
    """What the rules say of the sites of every block; and rules for all other layers, each by its whole path.

    Nothing is computed. Where rules differ in layers of one stack, `cut_by_rules` has cut it.

    Raises:
      ValueError: as `quantize_model`; or a site that is not a dense layer, or was trained with `DotGeneral`.
    """

    def all_blocks(model):
        return [model.block(index) for index in range(model.num_blocks)]

    blocks = jax.eval_shape(all_blocks, model)
    packed = jax.eval_shape(lambda model: all_blocks(quantize_model(model, rules)), model)
    plans = tuple(plan_sites(model.block_sites, *each) for each in zip(blocks, packed, strict=True))
    rest = jax.eval_shape(lambda model, packed: model.with_blocks(packed), model, packed)
    return plans, rules_for_others(rest, rules)


def plan_sites(sites: Sequence[Sites], block: nnx.Module, packed: nnx.Module) -> BlockPlan:
    """The plan for sites of a block, from the block after `quantize_model`; both may be abstract."""
    plans = []
    for each in sites:
        precisions = {}
        for name in each.names:
            before, after = layer_at(block, name), layer_at(packed, name)
            if type(before) is type(after):
                continue
            if not is_dense(before, is_stack=each.experts):
                raise ValueError(f"{name} is a {type(before).__name__}, not a dense layer: leave it out of the rules")
            if after.trained is not None:
                raise ValueError(f"{name} was trained with DotGeneral: pack such models with quantize_model")
            precisions[name] = after.precision
        plans.append(SitePlan(each, precisions))
    return tuple(plans)


def rules_for_others(model: nnx.Module, rules: Rules, sites: Sequence[Sites] = ()) -> list[tuple[str, Precision]]:
    """A rule for each float layer that the rules quantize and that is none of the sites, by its whole path."""
    names = {name for each in sites for name in each.names}
    paths = [layer.path for layer in float_layers(model) if layer.reason is None and layer.path not in names]
    aliases = names_of_layers(model)
    chosen = {path: chosen_precision(rules, *aliases(path)) for path in paths}
    return [(f"^{re.escape(path)}$", precision) for path, precision in chosen.items() if precision is not None]


def is_dense(layer: nnx.Module, *, is_stack: bool = False) -> bool:
    """Whether a float layer, or each of a stack, multiplies one matrix with the last axes of its input."""
    if type(layer) not in (nnx.Linear, nnx.LinearGeneral):
        return False
    axis, batch_axis, in_features, out_features = axes_of(layer)
    last = tuple(range(-len(axis), 0))
    ndim = is_stack + len(in_features) + len(out_features)
    return not batch_axis and tuple(sorted(axis)) == last and layer.kernel.ndim == ndim


def float_matrix(layer: nnx.Linear | nnx.LinearGeneral) -> Float[Array, "*experts k n"]:
    """The kernel of a dense layer or of a stack of them, its axes of inputs and of outputs merged."""
    return folded_kernel(layer, layer.kernel[...])


def packed_kernels(
    kernels: Sequence[Float[Array, "*experts k _"]],
    moments: SecondMoments,
    precision: Precision,
    method: Rounding,
    run: Run = call,
) -> list[BipolarArray]:
    """Rounds the kernels of layers with one input, whose moments these are, as one matrix; and packs each.

    Of stacks of experts, whose moments have a leading axis, those of one expert after the other, in one program.

    Args:
      kernels, moments, precision, method: see above.
      run: calls a program, or compiles it, see `compress.programs`.
    """
    weights = Precision(precision.w_bits, group_size=precision.group_size, scales=precision.scales)
    if moments.products.ndim == 3:
        return run(_packed_experts, kernels, moments, precision=weights, method=method)
    rows, hessian, cross = run(_rows_and_hessian, kernels, moments)
    rounded = round_in_stages(rows, hessian, cross, weights, method, run)
    return run(_packed_parts, rounded, sizes=tuple(kernel.shape[-1] for kernel in kernels), precision=weights)


@functools.partial(jax.jit, static_argnames=("precision", "method"))
def _packed_experts(
    kernels: Sequence[Float[Array, "experts k _"]], moments: SecondMoments, precision: Precision, method: Rounding
) -> list[BipolarArray]:
    def of_expert(operands):
        kernels, hessian = operands
        rounded = round_in_stages(_rows(kernels), hessian, None, precision, method)
        return _packed_parts(rounded, tuple(kernel.shape[-1] for kernel in kernels), precision)

    return jax.lax.map(of_expert, (list(kernels), expert_hessians(moments)))


@jax.jit
def _rows_and_hessian(
    kernels: Sequence[Float[Array, "k _"]], moments: SecondMoments
) -> tuple[Float[Array, "n k"], Float[Array, "k k"], Float[Array, "k k"] | None]:
    return _rows(kernels), moments.hessian(), moments.cross()


def _rows(kernels: Sequence[Float[Array, "k _"]]) -> Float[Array, "n k"]:
    return jnp.concatenate([kernel.astype(jnp.float32).T for kernel in kernels])


@functools.partial(jax.jit, static_argnames=("sizes", "precision"))
def _packed_parts(rounded: RoundedRows, sizes: tuple[int, ...], precision: Precision) -> list[BipolarArray]:
    """Packs so many rows after each other, each as the kernel of a layer."""
    packed, start = [], 0
    for size in sizes:
        part = jax.tree.map(lambda leaf, at=start, n=size: leaf[at : at + n], rounded)
        start += size
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


def packed_layer(layer: nnx.Linear | nnx.LinearGeneral, kernel: BipolarArray, precision: Precision) -> Linear:
    """The packed layer for a float one, with this kernel.

    Its precision names a calibration that gives kernels of this structure, with offsets or without, because files
    restore the structure of a layer from its precision.
    """
    has_offset = kernel.offset is not None
    if kernel.groups is None and has_offset != (precision.calibration == "minmax"):
        precision = dataclasses.replace(precision, calibration="minmax" if has_offset else "absmax")
    return Linear.from_packed(layer, kernel, precision)

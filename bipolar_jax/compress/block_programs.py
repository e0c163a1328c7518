"""The compiled programs that calibration runs on every block, and their compilation beside each other.

A block needs a dozen programs, which compile for much longer than they run. They are known before any of them has run,
from shapes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.expert_moments import add_expert_inputs, empty_expert_moments
from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.compress.packed_sites import BlockPlan, SitePlan, float_matrix, packed_kernels, with_packed_layers
from bipolar_jax.compress.programs import Run, SideBySide, call
from bipolar_jax.compress.reconstruction import Reconstruction
from bipolar_jax.compress.reconstruction.reconstruct import reconstructed
from bipolar_jax.compress.rounded_layers import numbers_of_kernels, with_rounded_layers
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.nn.compressible import Compressible, layer_at, with_signs
from bipolar_jax.nn.layers.linear import sizes
from bipolar_jax.packing import BipolarArray


@functools.partial(jax.jit, static_argnames="cache_bits")
def enter_blocks(model: Compressible, batch: Any, cache_bits: int | None, signs: Any = None) -> Any:
    """The carry of the first block; with `cache_bits` attention reads what such a cache has.

    `signs` are those of `without_signs`, None where the model has its own.
    """
    model = with_signs(model, signs)
    return model.enter_blocks(batch) if cache_bits is None else model.enter_blocks(batch, cache_bits)


@jax.jit
def run_block(model: Compressible, block: nnx.Module, carry: Any) -> Any:
    """The carry of the next block."""
    return model.run_block(block, carry)


@functools.partial(jax.jit, static_argnames=("remaining", "a_formats"), donate_argnames="moments")
def add_moments(model, block, carry, moments, floats, *, remaining, a_formats) -> tuple[SecondMoments, ...]:
    """The second moments of the first of the remaining sites, for each format of activations, with one batch.

    `floats` are the float block and its carry, if the inputs of the float model are asked for, too.
    """
    x, stream = site_inputs(model, block, carry, remaining)
    stream = stream if remaining[0].adds_to_stream else None
    if remaining[0].experts:
        added = (add_expert_inputs(*each, stream) for each in zip(moments, [x] * len(moments), a_formats, strict=True))
        return tuple(added)
    float_x = None if floats is None else site_inputs(model, *floats, remaining)[0]
    return tuple(sums.add(x, a_format, stream, float_x) for sums, a_format in zip(moments, a_formats, strict=True))


def formats_of_inputs(plan: SitePlan) -> tuple:
    """The formats of activations that the plan's layers have, each once; None for float ones."""
    return tuple(dict.fromkeys(precision.a_format for precision in plan.precisions.values()))


def empty_moments(block: nnx.Module, plan: SitePlan, *, with_cross: bool = False) -> tuple[SecondMoments, ...]:
    """Sums over no tokens, for each of `formats_of_inputs`."""
    first = layer_at(block, plan.sites.names[0])
    k = math.prod(sizes(first.in_features))
    if plan.sites.experts:
        return tuple(empty_expert_moments(len(first.kernel[...]), k) for _ in formats_of_inputs(plan))
    return tuple(SecondMoments.zeros(k, with_cross=with_cross) for _ in formats_of_inputs(plan))


def float_matrices(block: nnx.Module, names: tuple[str, ...]) -> list[Float[Array, "*experts k _"]]:
    """The kernels of float layers as matrices, or as stacks of them."""
    return [float_matrix(layer_at(block, name)) for name in names]


def rounded_block(
    block: nnx.Module, plan: SitePlan, kernels: Mapping[str, BipolarArray], run: Run = call
) -> nnx.Module:
    """The block as what follows the plan's site sees it: layers that compute what the packed ones will, or these.

    Args:
      block: whose layers at this site are float; or its shapes.
      plan: of the site.
      kernels: the packed kernels, by path; or their shapes.
      run: calls a program, or compiles it, see `compress.programs`.
    """
    if plan.sites.experts:
        numbers, put = kernels, functools.partial(with_packed_layers, precisions=plan.precisions)
    else:
        numbers = dict(zip(kernels, run(numbers_of_kernels, list(kernels.values())), strict=True))
        a_formats = {name: plan.precisions[name].a_format for name in kernels}
        put = functools.partial(with_rounded_layers, a_formats=a_formats)
    return put(block, numbers) if run is call else jax.eval_shape(put, block, numbers)


def compile_programs(
    model: Compressible,
    block: nnx.Module,
    carry: Any,
    plan: BlockPlan,
    method: Rounding,
    beside: Any = None,
    reconstruction: Reconstruction | None = None,
) -> None:
    """Compiles the programs of a block at the same time, as far as there are cores; nothing is computed.

    Args:
      model, block, carry: as the programs get them; the block is float.
      plan: what is done with the block's sites.
      method: how weights are rounded.
      beside: the float block and its carry, as `add_moments` gets them; None for none.
      reconstruction: how the layers learn together; None if they do not.
    """
    float_block, of_block = block, {}
    with SideBySide() as compile_program:
        for index, each in enumerate(plan):
            formats = formats_of_inputs(each)
            if not formats:
                continue
            moments = jax.eval_shape(functools.partial(empty_moments, plan=each, with_cross=beside is not None), block)
            remaining = tuple(other.sites for other in plan[index:])
            static = {"remaining": remaining, "a_formats": formats}
            compile_program(add_moments, model, block, carry, moments, beside, **static)
            of_format, kernels = dict(zip(formats, moments, strict=True)), {}
            for precision, names in each.joined().items():
                floats = jax.eval_shape(functools.partial(float_matrices, names=names), block)
                packed = packed_kernels(floats, of_format[precision.a_format], precision, method, compile_program)
                kernels |= dict(zip(names, packed, strict=True))
            block = rounded_block(block, each, kernels, compile_program)
            of_block |= kernels
        compile_program(run_block, model, block, carry)
        if reconstruction is not None and of_block:
            stream = jax.eval_shape(lambda model, carry: model.stream(carry), model, carry)
            options = {"grid": method.grid, "run": compile_program}
            reconstructed(model, float_block, [carry], [stream], of_block, plan, reconstruction, **options)

"""The compiled programs that calibration runs on every block, and their compilation beside each other.

A block needs a dozen programs, which compile for much longer than they run. They are known before any of them has run,
from shapes alone.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.expert_moments import add_expert_inputs, empty_expert_moments
from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.compress.packed_sites import BlockPlan, SitePlan, float_matrix, packed_kernels, with_packed_layers
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.nn.compressible import Compressible, layer_at
from bipolar_jax.nn.layers.linear import sizes

# More threads compile no faster: Python makes the programs one after the other.
_MOST_THREADS = 8


@functools.partial(jax.jit, static_argnames="cache_bits")
def enter_blocks(model: Compressible, batch: Any, cache_bits: int | None) -> Any:
    """The carry of the first block; with `cache_bits` attention reads what such a cache has."""
    return model.enter_blocks(batch) if cache_bits is None else model.enter_blocks(batch, cache_bits)


@jax.jit
def run_block(model: Compressible, block: nnx.Module, carry: Any) -> Any:
    """The carry of the next block."""
    return model.run_block(block, carry)


@functools.partial(jax.jit, static_argnames=("remaining", "a_formats"), donate_argnames="moments")
def add_moments(model, block, carry, moments, remaining, a_formats, floats=None) -> tuple[SecondMoments, ...]:
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


def compile_programs(
    model: Compressible, block: nnx.Module, carry: Any, plan: BlockPlan, method: Rounding, beside: Any = None
) -> None:
    """Compiles the programs of a block at the same time, as far as there are cores; nothing is computed.

    Args:
      model, block, carry: as the programs get them; the block is float.
      plan: what is done with the block's sites.
      method: how weights are rounded.
      beside: the float block and its carry, as `add_moments` gets them; None for none.
    """
    with_cross = beside is not None
    with concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        compiling = []
        for index, each in enumerate(plan):
            formats = formats_of_inputs(each)
            if not formats:
                continue
            moments = jax.eval_shape(lambda block, each=each: empty_moments(block, each, with_cross=with_cross), block)
            remaining = tuple(other.sites for other in plan[index:])
            lowered = add_moments.lower(model, block, carry, moments, remaining, formats, beside)
            compiling.append(pool.submit(lowered.compile))
            of_format, rounded = dict(zip(formats, moments, strict=True)), {}
            for precision, names in each.joined().items():
                floats = jax.eval_shape(lambda block, names=names: float_matrices(block, names), block)
                arguments = floats, of_format[precision.a_format]
                compiling.append(pool.submit(packed_kernels.lower(*arguments, precision, method).compile))
                packed = jax.eval_shape(
                    functools.partial(packed_kernels, precision=precision, method=method), *arguments
                )
                rounded |= dict(zip(names, packed, strict=True))
            pack = functools.partial(with_packed_layers, precisions=each.precisions)
            block = jax.eval_shape(pack, block, rounded)
        compiling.append(pool.submit(run_block.lower(model, block, carry).compile))
        for program in compiling:
            program.result()

"""Matrix product of packed operands on Hopper's tensor cores.

One persistent block a multiprocessor. A producer warpgroup loads blocks of both operands by
TMA into a ring of slots and runs ahead across output tiles; two or three consumer warpgroups multiply
and finish tiles independently, so that while one is in its epilogue the others, and the loads,
go on. Products never leave registers before they are finished numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.group_sizes import GEMM_GROUP_SIZES
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.gemm.config import WARPGROUP_REGISTERS, Tiling
from bipolar_jax.kernels.sm90.gemm.consumer import consume
from bipolar_jax.kernels.sm90.gemm.loads import Sources, aligned, terms_of_parts
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadTargets
from bipolar_jax.kernels.sm90.gemm.outputs.signs import SignTargets
from bipolar_jax.kernels.sm90.gemm.problem import Work
from bipolar_jax.kernels.sm90.gemm.producer import produce
from bipolar_jax.kernels.sm90.gemm.smem import scratch_of


def packed_matmul(
    x_words: UInt32[Array, "x_planes m x_words"],
    w_words: UInt32[Array, "w_planes n w_words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    tiling: Tiling,
    dtype: jnp.dtype,
    *,
    group_size: int | None = None,
    group_terms: GroupTerms | None = None,
    residual: Float[Array, "m n"] | None = None,
    activation: Activation | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """x . w^T of packed numbers, finished by the epilogue.

    Args:
      x_words: bit planes (kind "planes": bit b of word w is element 32 w + b) or signed bytes
        (kind "int8", one plane, elements in the same order as w's), zero where k is not below the
        true K; the number of words a multiple of 4.
      w_words: likewise.
      tokens: terms of rows; scale None makes the output the int32 product.
      columns: terms of columns.
      recovery: how planes make products.
      tiling: shape of the work.
      dtype: of the output: float32, bfloat16, float16, or int32.
      group_size: elements of K that share a scale, one of GEMM_GROUP_SIZES; for bytes only.
      group_terms: of every group, if there is a group_size.
      residual: added to the output, in `dtype`, after the cast.
      activation: function of the product in float32, before the cast; a gated one makes one column of two.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in `dtype`, or [m, n / 2] if gated.

    Raises:
      ValueError: a tiling that does not fit, words that TMA cannot address, groups of another size,
        or an activation of integers or with groups or a residual.
    """
    (_, m, x_width), (_, n, w_width) = x_words.shape, w_words.shape
    if x_width % 4 or w_width % 4:
        raise ValueError(f"rows must be multiples of 4 words, got {x_width} words of x and {w_width} of w")
    if group_size is not None and group_size not in GEMM_GROUP_SIZES:
        raise ValueError(f"group_size must be 32, 64 or a multiple of 128 up to 1024, got {group_size}")
    if activation is not None and (tokens.scale is None or group_size is not None or residual is not None):
        raise ValueError("an activation is of scaled products, without groups and without a residual")
    n //= 1 if activation is None else activation.parts  # from here on, columns of the output
    max_clusters = blocks // tiling.cluster_size
    work = Work(m, n, recovery, tiling, dtype, max_clusters, group_size, activation, interpret is not None)
    # What TMA stores, and loads, has rows of whole 16 bytes.
    columns_unit = TMA_ALIGNMENT // jnp.dtype(dtype).itemsize
    if residual is not None:
        residual = fill_up(residual.astype(dtype), columns_unit)
    terms = (terms_of_parts(tokens, 1), terms_of_parts(columns, work.parts))
    sources = Sources((x_words, w_words), aligned(group_terms), terms, residual)
    out = launch(work, sources, jax.ShapeDtypeStruct((m, -(-n // columns_unit) * columns_unit), dtype), interpret)
    return out[:, :n]


def launch(work: Work, sources: Sources, out_type, interpret: plgpu.InterpretGPUParams | None):
    """Runs the kernel; returns what it writes, of `out_type`: one array, or for heads three, for signs two."""
    tiling = work.tiling
    scratch = scratch_of(work, sources)
    flat, tree = jax.tree.flatten(sources)
    return launch_kernel(
        functools.partial(_kernel, work, tree),
        out_type=out_type,
        grid=(work.clusters,),
        grid_names=("cluster",),
        cluster=(tiling.cluster_m, tiling.cluster_n),
        cluster_names=("cluster_m", "cluster_n"),
        num_threads=tiling.consumers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        # No thread reads what it or an async copy then overwrites without a barrier in between.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=work.activation is not None,
        ),
        kernel_name=_name(work, sources),
        interpret=interpret,
    )(*flat)


def _name(work: Work, sources: Sources) -> str:
    """As profilers show it."""
    endings = {
        "heads": work.heads is not None,
        "residual": sources.residual is not None,
        "activation": work.activation is not None,
        "signs": work.as_signs,
    }
    return "_".join(["packed_matmul", *(name for name, there in endings.items() if there)])


def _kernel(work: Work, tree, *sources_and_out, staging=None, arrived=None, **shared):
    sources = jax.tree.unflatten(tree, sources_and_out[: tree.num_leaves])
    outputs = sources_and_out[tree.num_leaves :]
    warpgroup = lax.axis_index("warpgroup")
    producer_registers, consumer_registers = WARPGROUP_REGISTERS[work.tiling.consumers]

    @pl.when(warpgroup == work.tiling.consumers)
    def _():
        plgpu.set_max_registers(producer_registers, action="decrease")
        produce(work, sources, **shared)

    @pl.when(warpgroup < work.tiling.consumers)
    def _():
        plgpu.set_max_registers(consumer_registers, action="increase")
        consume(work, _targets(work, outputs, sources.heads), staging, sources.residual, arrived, **shared)


def _targets(work: Work, outputs, heads: dict | None):
    if work.as_signs:
        return SignTargets(*outputs)
    return outputs[0] if heads is None else HeadTargets(*outputs, **heads | {"layer": heads["layer"][0]})

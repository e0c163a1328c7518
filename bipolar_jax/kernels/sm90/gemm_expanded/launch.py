"""Product of many tokens with prepared weights of 1 to 8 bits: the entry, the kernel and its launch.

A persistent kernel as that of `gemm`, one producer and two consumer warpgroups a block, with the operands exchanged:
weights are the rows of the accumulators. They arrive packed, and the consumers expand them in registers, from which the
int8 tensor cores read them: neither memory nor shared memory ever holds a weight's byte. Integer groups are applied
where codes are expanded, so that int32 sums run over all of K, and one scale a column is left for the epilogue. Float
scales of groups are applied to the sums of chunks of K (`scaled_multiply.py`). Tokens may be 16-bit floats, for which
weights become such (`floats/`).

`packing.fields` says how weights are laid out, `recovery.py` which terms complete their sums.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.split_sums import add_splits
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.core.wgmma import accumulator_dtype
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS, Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output
from bipolar_jax.kernels.sm90.gemm.producer import arrange
from bipolar_jax.kernels.sm90.gemm_expanded.consumer import consume
from bipolar_jax.kernels.sm90.gemm_expanded.output import TransposedOutput
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.producer import Sources, produce
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedFloatRecovery, ExpandedRecovery, ScaledRecovery
from bipolar_jax.kernels.sm90.gemm_expanded.scaled_multiply import SUMS_ORDER, in_order_of_lanes
from bipolar_jax.kernels.sm90.gemm_expanded.smem import Scratch, scratch_types
from bipolar_jax.packing import PreparedArray

# 256 weights by 128 tokens a block: the fastest of large products; `backend/expanded_planning.py` has those of smaller.
DEFAULT_TILING = Tiling(128, 128, "split_n", slots=4, band=8, band_axis="n")


class SummedTokens(NamedTuple):
    """Tokens of a product with float scales of groups.

    Attributes:
      words: unsigned codes as bytes; any from the true K on.
      chunk_sums: float32, sums of codes over the part of every chunk of K that is below the true K.
    """

    words: UInt32[Array, "1 m words"]
    chunk_sums: Float[Array, "m chunks"]


class ExpandedOperands(NamedTuple):
    """The operands of `expanded_matmul`, in its order."""

    x: UInt32[Array, "1 m words"] | SummedTokens | Float[Array, "1 m padded_k"]
    weights: PreparedArray
    tokens: TokenTerms
    columns: ColumnTerms
    recovery: ExpandedRecovery | ScaledRecovery | ExpandedFloatRecovery


def expanded_matmul(
    x: UInt32[Array, "1 m words"] | SummedTokens | Float[Array, "1 m padded_k"],
    weights: PreparedArray,
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: ExpandedRecovery | ScaledRecovery | ExpandedFloatRecovery,
    dtype: jnp.dtype,
    *,
    tiling: Tiling = DEFAULT_TILING,
    residual: Float[Array, "m n"] | None = None,
    activation: Activation | None = None,
    blocks: int = MULTIPROCESSORS,
    lag: int = 0,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """x . w^T of signed bytes, or of 16-bit floats, and prepared weights, finished by the epilogue.

    Args:
      x: signed codes of tokens as bytes, zero from the true K on, as `quantize_rows` gives them of kind "int8", through
        `token_order.words_in_order`. Of weights with float terms `SummedTokens`. Of an `ExpandedFloatRecovery` floats
        of its kind, as `token_order.tokens_in_order` has them. Rows are multiples of 16 bytes.
      weights: [k, n], gated if the activation is; scales and sums are those of `columns`.
      tokens: terms of the output's rows; scale None makes the output the int32 product.
      columns: terms of the output's columns. `code_sums` are the sums of s * u + o over the true K with groups, those
        of codes without; `scale` is S with groups, the scale of values 2 u - V without.
      recovery: how sums of bytes make the product of values.
      dtype: of the output: float32, bfloat16, float16, or int32.
      tiling: tile shape and order, see `problem`.
      residual: added to the output, in `dtype`, after the cast.
      activation: applied to the product in float32, before the cast; a gated one makes one column of two.
      blocks: persistent thread blocks, at most one a multiprocessor.
      lag: stages between the consumers of a tile, see `problem`.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in `dtype`, or [m, n / 2] if gated.

    Raises:
      ValueError: a tiling that does not fit, or splits K of gated weights; words that TMA cannot address, K whose sums
        exceed int32, operands that do not belong together, or an activation together with integers or a residual.
    """
    scaled, is_float = isinstance(x, SummedTokens), isinstance(recovery, ExpandedFloatRecovery)
    rows = x.words if scaled else x
    _, m, width = rows.shape
    if width * rows.dtype.itemsize % TMA_ALIGNMENT:
        raise ValueError(f"rows must be multiples of 16 bytes, got {width} numbers of {rows.dtype} in x")
    if (
        recovery.k != weights.contracted_size
        or recovery.grouped != (weights.terms is not None)
        or scaled != (weights.float_terms is not None and not is_float)
        or (is_float and weights.float_terms not in (None, "offsets"))
    ):
        raise ValueError(f"{recovery} is not of {weights} with {weights.chunks} chunks of groups")
    if isinstance(recovery, ExpandedRecovery) and recovery.k > recovery.most_elements:
        raise ValueError(f"sums over {recovery.k} elements exceed int32: at most {recovery.most_elements}")
    if activation is not None and (columns.scale is None or residual is not None):
        raise ValueError("an activation is of scaled products without a residual")
    of_weights = {"w_bits": weights.bits, "chunks": weights.chunks, "float_terms": weights.float_terms, "lag": lag}
    n = weights.shape[-1]
    if tiling.splits > 1:
        if weights.gated:
            raise ValueError(f"columns of gated weights are in the order of tiles: no splits of K, got {tiling}")
        problem = ExpandedProblem(m, n, recovery, tiling, blocks, **of_weights)
        output = TransposedOutput.of(accumulator_dtype(recovery.kind), None)
        (sums,) = launch(problem, x, weights, tokens, columns, output, interpret=interpret)
        return add_splits(sums[..., :n], recovery, tokens, columns, jnp.dtype(dtype), residual, activation)
    n //= 1 if activation is None else activation.parts
    problem = ExpandedProblem(m, n, recovery, tiling, blocks, activation=activation, **of_weights)
    output = TransposedOutput.of(jnp.dtype(dtype), residual)
    (out,) = launch(problem, x, weights, tokens, columns, output, interpret=interpret)
    return out[:, :n]


def launch(
    problem: ExpandedProblem,
    x: UInt32[Array, "1 tokens words"] | SummedTokens | Float[Array, "1 tokens padded_k"],
    weights: PreparedArray,
    tokens: TokenTerms,
    columns: ColumnTerms,
    output: Output,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> list[jax.Array]:
    """Runs the kernel; arguments as `gemm.launch.launch` has them.

    Raises:
      ValueError: tokens along another axis than the output's; what does not fit shared memory or registers.
    """
    if output.token_axis != problem.token_axis:
        raise ValueError(
            f"tokens are axis {problem.token_axis} of the accumulator, but {type(output).__name__} takes them "
            f"along axis {output.token_axis}"
        )
    x, token_sums = x if isinstance(x, SummedTokens) else (x, None)
    if token_sums is not None:
        by_sequence = token_sums.reshape(problem.sequences, problem.m, -1).swapaxes(1, 2)
        token_sums = in_order_of_lanes(fill_up(by_sequence, SUMS_ORDER))
    terms = arrange(problem, (x, weights.words), tokens, columns).terms
    sources = Sources(x, weights.words, weights.terms, token_sums, terms)
    arrays, tree = jax.tree.flatten((sources, output))
    return launch_kernel(
        functools.partial(_kernel, problem, tree),
        out_type=output.out_types(problem),
        grid=(problem.clusters,),
        grid_names=("cluster",),
        cluster=(problem.tiling.cluster_m, problem.tiling.cluster_n),
        cluster_names=("cluster_m", "cluster_n"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types(problem, sources, output),
        # No automatic barriers: every write of shared memory, by threads or TMA, follows a barrier of our own behind
        # the reads of what it overwrites.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=problem.activation is not None,
        ),
        kernel_name="_".join(
            [
                "expanded_matmul",
                *["scaled"] * problem.scales_sums,
                *["floats"] * problem.is_float,
                *["activation"] * (problem.activation is not None),
                *output.name_endings,
            ]
        ),
        interpret=interpret,
    )(*arrays)


def _kernel(problem: ExpandedProblem, tree: Any, *refs: Any, **scratch: Any) -> None:
    sources, output = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    targets = refs[tree.num_leaves :]
    shared = Scratch(**{name: scratch.pop(name) for name in Scratch._fields})
    warpgroup = lax.axis_index("warpgroup")
    producer_registers, consumer_registers = problem.registers

    @when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(producer_registers, action="decrease")
        produce(problem, sources, shared)

    @when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(consumer_registers, action="increase")
        consume(problem, output, targets, shared, scratch)

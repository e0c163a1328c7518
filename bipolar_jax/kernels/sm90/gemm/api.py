"""The product as a matrix: `packed_matmul`."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.group_sizes import GEMM_GROUP_SIZES
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.arithmetic.split_sums import add_splits
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.launch import launch
from bipolar_jax.kernels.sm90.gemm.outputs.dense import DenseOutput
from bipolar_jax.kernels.sm90.gemm.problem import Problem


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
    """x . w^T of packed operands, finished by the epilogue.

    Args:
      x_words: bit planes (kind "planes": bit b of word w is element 32 w + b) or signed bytes (kind "int8": one plane,
        elements in the same order as w's), zero from the true K on. A row is a multiple of 16 bytes.
      w_words: likewise.
      tokens: terms of the output's rows; scale None makes the output the int32 product.
      columns: terms of the output's columns.
      recovery: how products of planes or bytes make the product of values.
      tiling: tile shape and order.
      dtype: of the output: float32, bfloat16, float16, or int32.
      group_size: elements of K that share a scale, one of GEMM_GROUP_SIZES; for bytes only.
      group_terms: terms of every group, if there is a group_size.
      residual: added to the output, in `dtype`, after the cast.
      activation: applied to the product in float32, before the cast; a gated one makes one column of two.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in `dtype`, or [m, n / 2] if gated.

    Raises:
      ValueError: a tiling that does not fit, or splits the K of groups; rows of words that TMA cannot address, another
        group size, or an activation together with integers, groups or a residual.
    """
    (_, m, x_width), (_, n, w_width) = x_words.shape, w_words.shape
    aligned = TMA_ALIGNMENT // 4
    if x_width % aligned or w_width % aligned:
        raise ValueError(f"rows must be multiples of {aligned} words, got {x_width} words of x and {w_width} of w")
    if group_size is not None and group_size not in GEMM_GROUP_SIZES:
        raise ValueError(f"group_size must be 32, 64 or a multiple of 128 up to 1024, got {group_size}")
    if activation is not None and (tokens.scale is None or group_size is not None or residual is not None):
        raise ValueError("an activation is of scaled products, without groups and without a residual")
    if tiling.splits > 1:
        problem = Problem(m, n, recovery, tiling, blocks, group_size)
        output = DenseOutput.of(jnp.dtype(jnp.int32), None)
        (sums,) = launch(problem, (x_words, w_words), tokens, columns, output, interpret=interpret)
        return add_splits(sums[..., :n], recovery, tokens, columns, jnp.dtype(dtype), residual, activation)
    n //= 1 if activation is None else activation.parts  # from here on, columns of the output
    problem = Problem(m, n, recovery, tiling, blocks, group_size, activation)
    output = DenseOutput.of(jnp.dtype(dtype), residual)
    (out,) = launch(problem, (x_words, w_words), tokens, columns, output, group_terms=group_terms, interpret=interpret)
    return out[:, :n]

"""From a finished accumulator to numbers of the output: correction terms, scales, offsets, bias, activation.

`recovery` derives the correction. The terms are vectors over tokens and over the output's columns. Functions named
`_transposed`, and those of groups, take accumulators whose rows are columns of the output.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic import activations
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery, Recovery
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW

_ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)
_ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTerms:
    """The epilogue's vectors over tokens; within a kernel with leading axes, such as one of buffers.

    Attributes:
      code_sums: sums of the unsigned codes.
      zero_code: the code that stands for zero.
      scale: of the token; None leaves the product an integer.
    """

    code_sums: Int[Array, "*rows m"]
    zero_code: Int[Array, "*rows m"]
    scale: Float[Array, "*rows m"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ColumnTerms:
    """The epilogue's vectors over columns of the output, with leading axes like `TokenTerms`; None: nothing to apply.

    Attributes:
      code_sums: sums of the column's codes. With one scale a column.
      scale: of the column.
      offset: of the column's numbers.
      scaled_value_sums: sum over groups of scale times sum of values. With one scale a group.
      bias: added last.
    """

    code_sums: Int[Array, "*rows n"] | None = None
    scale: Float[Array, "*rows n"] | None = None
    offset: Float[Array, "*rows n"] | None = None
    scaled_value_sums: Float[Array, "*rows n"] | None = None
    bias: Float[Array, "*rows n"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupTerms:
    """The mainloop's vectors of every group of K.

    y = s_x (sum_g (scale_g T_g + offset_g X_g) + ...) where T_g is the group's sum of products.

    Attributes:
      scale: of each column.
      offset: of each column; None if all are 0.
      token_sums: X_g, sums over the group of each token's values, if there are offsets.
    """

    scale: Float[Array, "*groups n"]
    offset: Float[Array, "*groups n"] | None = None
    token_sums: Float[Array, "*groups m"] | None = None


def chunk_columns(dtype: jnp.dtype) -> int:
    """Columns of the output in one chunk of the staging buffer: rows of 128 bytes."""
    return BYTES_PER_ROW // jnp.dtype(dtype).itemsize


def staging_transforms(width: int, dtype: jnp.dtype) -> tuple[plgpu.SwizzleTransform]:
    """Transforms of the staging buffer that TMA stores from: rows as wide as the swizzle."""
    return (plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize),)


def finish(
    product: Int[Array, "tile_m width"],
    recovery: Recovery,
    tokens: TokenTerms,
    columns: ColumnTerms,
    dtype: jnp.dtype,
) -> Array:
    """A chunk of the accumulator as finished numbers in `dtype`; the terms are refs in shared memory.

    y = s_x (s_w t + o_w X) + bias, where t is the exact (half) product of values and X the sum of the token's values;
    see `recovery`.
    """
    return _finish(product, recovery, tokens, columns, token_axis=0).astype(dtype)


def finish_floats(
    total: Float[Array, "width tile_m"],
    recovery: FloatRecovery,
    tokens: TokenTerms,
    columns: ColumnTerms,
    dtype: jnp.dtype = jnp.float32,
) -> Array:
    """`finish_transposed` for sums of float activations times numbers of weights: scales and bias."""

    def along_columns(term):
        return lax.broadcast_in_dim(_load_term(term, _ALONG_ROWS), total.shape, (0,))

    y = total * (1 / recovery.unit) * along_columns(columns.scale)
    if tokens.scale is not None:
        y = y * lax.broadcast_in_dim(_load_term(tokens.scale, _ALONG_COLUMNS), total.shape, (1,))
    if columns.bias is not None:
        y = y + along_columns(columns.bias)
    return y.astype(dtype)


def activate(activation: Activation, chunks: list[Float[Array, "tile_m width"]], dtype: jnp.dtype) -> Array:
    """The activation of one chunk, or, gated, of a chunk of gates and one of what they multiply; in `dtype`."""
    y = activations.apply(activation.function, chunks[0])
    return (y * chunks[1] if activation.gated else y).astype(dtype)


def finish_transposed(
    product: Int[Array, "tile_n width"], recovery: Recovery, tokens: TokenTerms, columns: ColumnTerms
) -> Array:
    """`finish` for an accumulator whose rows are columns of the output; float32, or int32 without scales."""
    return _finish(product, recovery, tokens, columns, token_axis=1)


def _finish(product: Array, recovery: Recovery, tokens: TokenTerms, columns: ColumnTerms, token_axis: int) -> Array:
    shape = product.shape
    layouts = {0: _ALONG_ROWS, 1: _ALONG_COLUMNS}
    load_token = functools.partial(_load_term, layout=layouts[token_axis])
    load_column = functools.partial(_load_term, layout=layouts[1 - token_axis])
    # Sums that fit the 24 bits of a float32 are exact in it, and float arithmetic is twice as fast as integer
    # arithmetic.
    number = jnp.float32 if tokens.scale is not None and recovery.fits_float32 else jnp.int32

    def of_tokens(vector):
        return lax.broadcast_in_dim(vector, shape, (token_axis,))

    def of_columns(vector):
        return lax.broadcast_in_dim(vector, shape, (1 - token_axis,))

    code_sums, zero_code = load_token(tokens.code_sums), load_token(tokens.zero_code)
    value_sums = recovery.column_value_sums(load_column(columns.code_sums)).astype(number)
    total = product.astype(number) * recovery.product_weight + of_tokens(recovery.row_term(code_sums).astype(number))
    total = total + of_tokens(recovery.column_weight(zero_code).astype(number)) * of_columns(value_sums)
    if tokens.scale is None:
        return total
    y = total.astype(jnp.float32) * of_columns(load_column(columns.scale))
    if columns.offset is not None:
        x_sums = recovery.token_value_sums(code_sums, zero_code).astype(jnp.float32)
        y = y + of_tokens(x_sums) * of_columns(load_column(columns.offset))
    y = y * of_tokens(load_token(tokens.scale) * recovery.scale_factor)
    if columns.bias is not None:
        y = y + of_columns(load_column(columns.bias))
    return y


def add_group(
    acc: Int[Array, "tile_m tile_n"], total: Float[Array, "tile_m tile_n"], terms: GroupTerms, weight: int
) -> Float[Array, "tile_m tile_n"]:
    """total + weight * scale * acc + offset * token_sums of one group; the terms are refs in shared memory."""
    sums = plgpu.layout_cast(acc, plgpu.Layout.WGMMA).astype(jnp.float32)
    scale = load_column_vector(terms.scale)
    total = total + sums * lax.broadcast_in_dim(scale * float(weight), sums.shape, (1,))
    if terms.offset is not None:
        token_sums = lax.broadcast_in_dim(load_row_vector(terms.token_sums), sums.shape, (0,))
        total = total + token_sums * lax.broadcast_in_dim(load_column_vector(terms.offset), sums.shape, (1,))
    return total


def finish_grouped(
    total: Float[Array, "tile_m width"],
    recovery: Recovery,
    tokens: TokenTerms,
    columns: ColumnTerms,
    dtype: jnp.dtype,
) -> Float[Array, "tile_m width"]:
    """A chunk of the scaled sums of groups as finished numbers in `dtype`.

    y = s_x (total + z' sum_g s_g V_g) + bias; see `recovery` for the terms.
    """
    shape = total.shape
    zero = recovery.column_weight(load_row_vector(tokens.zero_code)).astype(jnp.float32)
    y = total + lax.broadcast_in_dim(zero, shape, (0,)) * lax.broadcast_in_dim(
        load_column_vector(columns.scaled_value_sums), shape, (1,)
    )
    y = y * lax.broadcast_in_dim(load_row_vector(tokens.scale) * recovery.scale_factor, shape, (0,))
    if columns.bias is not None:
        y = y + lax.broadcast_in_dim(load_column_vector(columns.bias), shape, (1,))
    return y.astype(dtype)


def _load_term(ref, layout: plgpu.Layout) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False)


load_row_vector = functools.partial(_load_term, layout=_ALONG_ROWS)
load_column_vector = functools.partial(_load_term, layout=_ALONG_COLUMNS)

"""The epilogue of sums over groups with float scales; rows of the accumulator are columns of the output."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.arithmetic.epilogue import (
    ColumnTerms,
    TokenTerms,
    load_column_vector,
    load_row_vector,
)
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery


def finish_groups_transposed(
    total: Float[Array, "tile_n width"], recovery: Recovery, tokens: TokenTerms, columns: ColumnTerms
) -> Float[Array, "tile_n width"]:
    """Token scales and bias for sums over groups that are already scaled and corrected."""
    y = total * lax.broadcast_in_dim(load_column_vector(tokens.scale) * recovery.scale_factor, total.shape, (1,))
    if columns.bias is not None:
        y = y + lax.broadcast_in_dim(load_row_vector(columns.bias), total.shape, (0,))
    return y


def finish_scaled_transposed(
    total: Float[Array, "tile_n width"], recovery: Recovery, tokens: TokenTerms, columns: ColumnTerms
) -> Float[Array, "tile_n width"]:
    """`finish_transposed` for sums t of signed codes of tokens times numbers of weights: float32.

    y = s_x s_w (t + z' N) + bias, with N the sum of the column's numbers (`columns.scaled_value_sums`).
    """
    zero = recovery.column_weight(load_column_vector(tokens.zero_code)).astype(jnp.float32)
    sums = load_row_vector(columns.scaled_value_sums)
    y = total * float(recovery.product_weight)
    y = y + lax.broadcast_in_dim(zero, y.shape, (1,)) * lax.broadcast_in_dim(sums, y.shape, (0,))
    y = y * lax.broadcast_in_dim(load_row_vector(columns.scale), y.shape, (0,))
    y = y * lax.broadcast_in_dim(load_column_vector(tokens.scale) * recovery.scale_factor, y.shape, (1,))
    return y if columns.bias is None else y + lax.broadcast_in_dim(load_row_vector(columns.bias), y.shape, (0,))

"""From the sums of splits of K to numbers of the output, by XLA: the epilogue of products whose tiles are too few.

Where a product has fewer tiles than the chip has multiprocessors, blocks multiply parts of K as tiles of their own and
leave their int32 sums in memory (float32 of float activations). One fused pass adds them, which is exact for integers,
and does what `epilogue` does in registers otherwise.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from bipolar_jax.kernels.semantics.epilogue import activate_and_add
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery, Recovery


def add_splits(
    sums: Num[Array, "splits m n"],
    recovery: Recovery | FloatRecovery,
    tokens: TokenTerms,
    columns: ColumnTerms,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Num[Array, "m out"]:
    """The product of all of K, finished; `epilogue.finish` says how.

    Args:
      sums: of every split, in the order of the output's columns.
      recovery: how sums make the product of values.
      tokens, columns: terms, vectors of m and n; a token scale of None leaves integers, as they are of `Recovery`.
      dtype: of the output and of the residual.
      residual: added after the cast.
      activation: applied in float32, before the cast; a gated one has gates first.
    """
    total = jnp.sum(sums, axis=0, dtype=sums.dtype)
    if isinstance(recovery, FloatRecovery):
        y = total * (1 / recovery.unit) * columns.scale[None]
        if tokens.scale is not None:
            y = y * tokens.scale[: total.shape[0], None]
    else:
        # Vectors over tokens may be longer than m: rows that the quantizer filled up.
        code_sums, zero_code = (term[: total.shape[0], None] for term in (tokens.code_sums, tokens.zero_code))
        value_sums = recovery.column_value_sums(columns.code_sums)[None]
        total = total * recovery.product_weight + recovery.row_term(code_sums)
        total = total + recovery.column_weight(zero_code) * value_sums
        if tokens.scale is None:
            return total.astype(dtype)
        y = total.astype(jnp.float32) * columns.scale[None]
        if columns.offset is not None:
            x_sums = recovery.token_value_sums(code_sums, zero_code).astype(jnp.float32)
            y = y + x_sums * columns.offset[None]
        y = y * (tokens.scale[: total.shape[0], None] * recovery.scale_factor)
    if columns.bias is not None:
        y = y + columns.bias[None]
    return activate_and_add(y, activation, dtype, residual)

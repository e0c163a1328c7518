"""Products of float activations with prepared weights and with integer groups.

Fields are expanded in registers, by `prepared_few_tokens` and `gemm_expanded`. Values of integer groups, and of the
formats, are exact in bfloat16 and float16, so that nothing but sums (float32) and the output is rounded; the columns'
scales follow in the epilogue. Of float groups few tokens multiply codes, and their sums are scaled; many tokens
multiply numbers that are rounded to the tokens' dtype.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT, Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.backend import cost
from bipolar_jax.kernels.sm90.backend.expanded_planning import (
    check_layout,
    chunks_of,
    expanded_times,
    float_terms_of,
    tiling_of_few_tokens,
    with_layout,
)
from bipolar_jax.kernels.sm90.backend.expanded_products import laid_out
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.floats.arrays import float_operands
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_floats
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from bipolar_jax.kernels.sm90.weight_only.config import check_dtype
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarNumbers, PreparedArray


def weight_only_matmul(
    x: Float[Array, "m k"],
    w: BipolarNumbers,
    bias: Float[Array, " n"] | None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
    *,
    tiling: Tiling | FewTokensTiling | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.weight_only_matmul`; with the tiling of `plan_matmul`, or another one.

    Raises:
      Unsupported: as `plan_matmul`.
    """
    gates = activation is not None and activation.gated
    plan, interpret = plan_matmul(x.shape[0], x.dtype, w), interpret_params()
    w = laid_out(w, gated=gates, for_floats=True)
    options = {"tiling": tiling or plan.tiling, "interpret": interpret}
    if isinstance(options["tiling"], FewTokensTiling):
        if w.gated == gates:
            return few_tokens_floats(x, w, bias, activation=activation, residual=residual, **options)
        product = few_tokens_floats(x, w, bias, **options)
    elif w.gated and gates and residual is None:
        return expanded_matmul(*float_operands(x, w, bias), x.dtype, activation=activation, **options)
    elif activation is None and not w.gated:
        return expanded_matmul(*float_operands(x, w, bias), x.dtype, residual=residual, **options)
    elif w.gated:
        bias = None if bias is None else w.rows_in_order_of_tiles(bias[:, None])[:, 0]
        operands = float_operands(x, w.in_order_of_tiles(), bias)
        product = w.columns_in_order(expanded_matmul(*operands, x.dtype, **options))
    else:
        product = expanded_matmul(*float_operands(x, w, bias), x.dtype, **options)
    return epilogue.activate_and_add(product, activation, x.dtype, residual)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarNumbers) -> Plan:
    """The plan for m tokens of `dtype`.

    Raises:
      Unsupported: float32 activations; offsets of columns; groups that are no multiple of 16.
    """
    check_dtype(dtype)
    check_layout(w, gated=False)
    if w.offset is not None:
        raise Unsupported("its kernels of float activations do not take offsets of prepared weights")
    name = jnp.dtype(dtype).name
    kind = "float" if float_terms_of(w) is not None else "integer"
    groups = f" in {kind} groups of {w.group_size}" if kind == "float" or w.has_integer_groups else ""
    kernel = f"{name} tensor cores, weights of {w.bits} bits{groups} expanded"
    if m > FEW_TOKENS_LIMIT:
        tiling = cost.cheapest(tiling_times(m, w))
    else:
        tiling = tiling_of_few_tokens(m, w, dtype, is_float=True)
    if tiling is None:
        gated = isinstance(w, PreparedArray) and w.gated
        sizes = (m, w.shape[-1], w.contracted_size, w.bits, chunks_of(w), gated)
        tiling = few_tokens_tiling(*sizes, float_terms=float_terms_of(w), rows_of_stage=2)
        reason = f"{m} tokens: bound by reading the weights"
        return Plan(f"{kernel} in registers", with_layout(reason, w), tiling)
    return Plan(f"{kernel} to {name} in registers", with_layout(cost.reason(tiling), w), tiling)


def tiling_times(m: int, w: BipolarNumbers) -> dict[Tiling, float]:
    """Modelled microseconds of the product in tiles, by tiling."""
    is_gated = isinstance(w, PreparedArray) and w.gated
    return expanded_times(m, w, jnp.bfloat16, may_split=not is_gated, is_float=True)

"""Products of float activations with prepared weights and with integer groups.

Values of integer groups, and of the formats, are exact in bfloat16 and float16, so that nothing but sums (float32) and
the output is rounded; the columns' scales follow in the epilogue. Few tokens and many read the fields and expand them
in registers, `prepared_few_tokens` and `gemm_expanded`. Without `expanded_planning.FLOATS_IN_REGISTERS` one kernel
writes the values of many tokens' weights to memory, 16 bits each, and the product of tiles multiplies them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT, Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery
from bipolar_jax.kernels.sm90.backend import cost, expanded_planning, planning
from bipolar_jax.kernels.sm90.backend.expanded_planning import check_layout, chunks_of, float_terms_of, with_layout
from bipolar_jax.kernels.sm90.backend.expanded_products import laid_out
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.floats.arrays import float_operands
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_floats
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from bipolar_jax.kernels.sm90.weight_only.config import check_dtype
from bipolar_jax.kernels.sm90.weight_prep.expand_floats import expand_floats
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarNumbers, PreparedArray

# Of FEW_TOKENS_LIMIT tokens. The expansion reads the weights, writes 16 bits for each, and reads these: at 4 bits the
# bytes of nine products of few tokens.
_MOST_PASSES = 2


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
    plan, w, interpret = plan_matmul(x.shape[0], x.dtype, w), laid_out(w, gated=gates), interpret_params()
    tiling = tiling or plan.tiling
    if isinstance(tiling, FewTokensTiling):
        products = [
            few_tokens_floats(x[start : start + FEW_TOKENS_LIMIT], w, bias, tiling=tiling, interpret=interpret)
            for start in range(0, x.shape[0], FEW_TOKENS_LIMIT)
        ]
        product = products[0] if len(products) == 1 else jnp.concatenate(products)
    elif expanded_planning.FLOATS_IN_REGISTERS:
        options = {"tiling": tiling, "interpret": interpret}
        if w.gated and gates and residual is None:
            return expanded_matmul(*float_operands(x, w, bias), x.dtype, activation=activation, **options)
        if activation is None and not w.gated:
            return expanded_matmul(*float_operands(x, w, bias), x.dtype, residual=residual, **options)
        if w.gated:
            bias = None if bias is None else w.rows_in_order_of_tiles(bias[:, None])[:, 0]
            operands = float_operands(x, w.in_order_of_tiles(), bias)
            product = w.columns_in_order(expanded_matmul(*operands, x.dtype, **options))
        else:
            product = expanded_matmul(*float_operands(x, w, bias), x.dtype, **options)
    else:
        product = packed_matmul(
            fill_up(x, TMA_ALIGNMENT // x.dtype.itemsize)[None],
            expand_floats(w, x.dtype, interpret=interpret)[None],
            TokenTerms(None, None, None),
            ColumnTerms(scale=w.scale[:, 0], bias=None if bias is None else bias.astype(jnp.float32)),
            FloatRecovery(PTX_TYPES[x.dtype.name], w.contracted_size),
            tiling,
            x.dtype,
            interpret=interpret,
        )
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
    in_registers = expanded_planning.FLOATS_IN_REGISTERS
    if m <= (1 if in_registers else _MOST_PASSES) * FEW_TOKENS_LIMIT:
        reason = f"{m} tokens{'' if m <= FEW_TOKENS_LIMIT else ' in two parts'}: bound by reading the weights"
        return Plan(f"{kernel} in registers", with_layout(reason, w), parted_tiling(m, w))
    tiling = cost.cheapest(tiling_times(m, w))
    where = "registers" if in_registers else "memory"
    return Plan(f"{kernel} to {name} in {where}", with_layout(cost.reason(tiling), w), tiling)


def tiling_times(m: int, w: BipolarNumbers) -> dict[Tiling, float]:
    """Modelled microseconds of the product of m tokens by tiling, without an expansion in memory."""
    if expanded_planning.FLOATS_IN_REGISTERS:
        is_gated = isinstance(w, PreparedArray) and w.gated
        return expanded_planning.expanded_times(m, w, jnp.bfloat16, may_split=not is_gated, is_float=True)
    return planning.tiling_times(m, w.shape[-1], w.contracted_size, "bf16", 1)


def parted_tiling(m: int, w: BipolarNumbers) -> FewTokensTiling:
    """The tiling of the product of few tokens, for m tokens of which it takes at most FEW_TOKENS_LIMIT at a time."""
    gated = isinstance(w, PreparedArray) and w.gated
    sizes = (min(m, FEW_TOKENS_LIMIT), w.shape[-1], w.contracted_size, w.bits, chunks_of(w), gated)
    return few_tokens_tiling(*sizes, float_terms=float_terms_of(w), rows_of_stage=2)

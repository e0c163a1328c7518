"""Variants of the Hopper matmul with one of its four optimizations disabled.

Every variant maps the same operands to the same bf16 product, including scales and zero codes, so that its slowdown
is the gain of the optimization.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Call, Product

_BINARY = BipolarFormat(1)


def parse_tiling(fields: Mapping[str, Any]) -> Tiling:
    """The tiling of "fixed tiling" from a config. Raises ValueError if the kernel cannot run it."""
    tiling = Tiling(**fields)
    tiling.check()
    return tiling


def full(product: Product, operands: Operands) -> Call:
    """The matmul with all optimizations."""
    return product.kernel(operands)


def fixed_tiling(product: Product, operands: Operands, tiling: Tiling) -> Call:
    """One tiling for all problems."""
    return product.kernel(operands, tiling)


def signed_planes(product: Product, operands: Operands) -> Call:
    """Two's complement instead of bipolar planes: the top plane has weight -2^(bits-1)."""
    recovery = _SignedRecovery("planes", product.a_format, product.w_format, product.shape.k, with_zero=True)
    tiling = product.choice.tiling

    def function(x_words, w_words, tokens, columns):
        return packed_matmul(
            x_words, w_words, tokens, columns, recovery, tiling, jnp.bfloat16, interpret=interpret_params()
        )

    planes = operands.x_words(product.a_format, "planes"), operands.w_words(product.w_format, "planes")
    tokens, columns = operands.tokens(product.a_format), operands.column_terms(product.w_format)
    x_sums, w_sums = (
        _signed_sums(words, fmt) for words, fmt in zip(planes, (product.a_format, product.w_format), strict=True)
    )
    x_sums = jnp.pad(x_sums, (0, tokens.scale.shape[0] - x_sums.shape[0]))  # as long as the other terms
    return function, (
        *planes,
        dataclasses.replace(tokens, code_sums=x_sums),
        dataclasses.replace(columns, code_sums=w_sums),
    )


def packed_in_the_call(product: Product, operands: Operands) -> Call:
    """No preprocessing: both operands are stored as one byte per code, and XLA packs them in every call."""
    kernel, (_, _, tokens, columns) = product.kernel(operands)
    a_format, w_format = product.a_format, product.w_format

    def function(x_codes, w_codes, tokens, columns):
        return kernel(code_words(x_codes, a_format, "planes"), code_words(w_codes, w_format, "planes"), tokens, columns)

    return function, (operands.codes(a_format), operands.weights(w_format).codes(), tokens, columns)


def recovered_in_memory(product: Product, operands: Operands) -> Call:
    """Every pair of planes is a separate matmul with int32 output; XLA shifts, adds and scales the results."""
    m, n, k = product.shape.m, product.shape.n, product.shape.k
    a_format, w_format = product.a_format, product.w_format
    recovery = _CountRecovery("planes", _BINARY, _BINARY, k, with_zero=True)
    tiling = dataclasses.replace(product, a_format=_BINARY, w_format=_BINARY).choice.tiling
    no_terms = TokenTerms(jnp.zeros(m, jnp.int32), jnp.zeros(m, jnp.int32), None), ColumnTerms(jnp.zeros(n, jnp.int32))

    def function(x_words, w_words, tokens, columns, no_terms):
        counts = 0
        for i, j in itertools.product(range(a_format.bits), range(w_format.bits)):
            count = packed_matmul(
                x_words[i : i + 1],
                w_words[j : j + 1],
                *no_terms,
                recovery,
                tiling,
                jnp.int32,
                interpret=interpret_params(),
            )
            counts += count * np.int32(a_format.plane_weights[i] * w_format.plane_weights[j])
        return _finish(counts, product.recovery(), tokens, columns)

    return function, (*product.kernel(operands)[1], no_terms)


def expected_output(variant: str, product: Product, operands: Operands) -> Float[np.ndarray, "rows columns"]:
    """The exact sample of a variant's output, in float64. Signed planes decode the same bits to other values."""
    if variant != "signed planes":
        return operands.exact_output(product.a_format, product.w_format)
    bits = operands.sampled_bits(product.a_format, product.w_format)
    formats = (product.a_format, product.w_format)
    x, w = (np.tensordot(_signed_weights(fmt), planes, axes=1) for fmt, planes in zip(formats, bits, strict=True))
    tokens, columns = operands.tokens(product.a_format), operands.column_terms(product.w_format)
    zero_code, token_scale = (
        np.asarray(term, np.float64)[operands.rows, None] for term in (tokens.zero_code, tokens.scale)
    )
    return (x - zero_code) @ w.T * token_scale * np.asarray(columns.scale, np.float64)[operands.columns]


def _finish(
    counts: Int[Array, "m n"], recovery: Recovery, tokens: TokenTerms, columns: ColumnTerms
) -> Float[Array, "m n"]:
    """The kernel's epilogue in XLA."""
    tokens = jax.tree.map(lambda term: term[: counts.shape[0]], tokens)
    total = counts * recovery.product_weight + recovery.row_term(tokens.code_sums)[:, None]
    total += recovery.column_weight(tokens.zero_code)[:, None] * recovery.column_value_sums(columns.code_sums)[None]
    y = total.astype(jnp.float32) * columns.scale[None]
    return (y * (tokens.scale * recovery.scale_factor)[:, None]).astype(jnp.bfloat16)


def _signed_sums(words: Array, number_format: BipolarFormat) -> Int[Array, " rows"]:
    counts = jnp.sum(jax.lax.population_count(words), axis=-1, dtype=jnp.int32)
    return sum(np.int32(weight) * count for weight, count in zip(_signed_weights(number_format), counts, strict=True))


def _signed_weights(number_format: BipolarFormat) -> list[int]:
    """Weights of two's complement planes, low plane first."""
    *low, top = number_format.plane_weights
    return [*low, -top]


@dataclasses.dataclass(frozen=True)
class _CountRecovery(Recovery):
    """Identity recovery: the output is the popcount sum itself, without row and column terms."""

    @property
    def product_weight(self) -> int:
        return 1

    def row_term(self, code_sums):
        return 0 * code_sums

    def column_weight(self, zero_code):
        return 0 * zero_code


@dataclasses.dataclass(frozen=True)
class _SignedRecovery(Recovery):
    """Products of two's complement codes c: sum_k (c_a - z) c_w = sum_ij p_i q_j popc(A_i & W_j) - z sum_k c_w.

    Here p and q are the planes' weights and z the zero code. The instruction can only add, but products of one top
    plane and one lower plane have negative weight. They are summed into the negated accumulator, which is negated
    back afterwards.
    """

    def pair_groups(self) -> list[tuple[int, list[tuple[int, int]]]]:
        a_weights, w_weights = _signed_weights(self.a_format), _signed_weights(self.w_format)
        groups, negated = [], False
        for factor, pairs in super().pair_groups():
            for negative in (negated, not negated):  # the accumulator's current sign first
                members = [(i, j) for i, j in pairs if (a_weights[i] * w_weights[j] < 0) == negative]
                if members:
                    groups.append((-factor if negative != negated else factor, members))
                    factor, negated = 1, negative
        return groups

    @property
    def ends_negated(self) -> bool:
        """Whether the accumulator is negated after the last group of pairs."""
        (_, pairs), *_ = reversed(self.pair_groups())
        a_weights, w_weights = _signed_weights(self.a_format), _signed_weights(self.w_format)
        i, j = pairs[0]
        return a_weights[i] * w_weights[j] < 0

    @property
    def product_weight(self) -> int:
        return -1 if self.ends_negated else 1

    def row_term(self, code_sums):
        return 0 * code_sums

    def column_weight(self, zero_code):
        return -zero_code

    def column_value_sums(self, code_sums):
        return code_sums

    @property
    def scale_factor(self) -> float:
        return 1.0

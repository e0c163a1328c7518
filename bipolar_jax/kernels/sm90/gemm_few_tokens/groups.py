"""Groups of K with their own scales, in the product of few tokens.

An instruction covers 256 elements of K. Shorter groups each have their own columns in the tokens' operand, zero outside
the group: one product of 256 elements has the sums of all its groups side by side, and groups cost no more than their
scaling.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import load_column_vector, load_row_vector
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.packing.words import WORD_BITS
from bipolar_jax.quantize.groups import num_groups

_INSTRUCTION_K = 256  # elements of K


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightGroups:
    """Scales, sums and offsets of the weights' groups.

    Attributes:
      scale: of each group of each row of weights.
      row_sums: sums of the codes of each group.
      offset: of the numbers of each group; None if all are 0.
      group_size: one of FEW_TOKENS_GROUP_SIZES.
    """

    scale: Float[Array, "n groups"]
    row_sums: Int[Array, "n groups"]
    offset: Float[Array, "n groups"] | None
    group_size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeGroups:
    """The kernel's terms of groups, which it reads from global memory.

    Attributes:
      weights: rows filled up to whole tiles.
      token_sums: sums of each token's codes over each group.
    """

    weights: WeightGroups
    token_sums: Int[Array, "groups width"]

    @property
    def group_size(self) -> int:
        return self.weights.group_size

    @property
    def products_per_slice(self) -> int:
        """Products that a slice of K is divided into: each covers whole groups."""
        return K_SLICE // max(_INSTRUCTION_K, self.group_size)

    @property
    def groups_per_instruction(self) -> int:
        """Groups that share an instruction."""
        return groups_per_instruction(self.group_size)


def groups_per_instruction(group_size: int | None) -> int:
    """Groups that share an instruction."""
    return 1 if group_size is None else max(1, _INSTRUCTION_K // group_size)


def decode_groups(
    x_words: UInt32[Array, "planes m words"], weights: WeightGroups, recovery: Recovery, rows: int, width: int
) -> DecodeGroups:
    """The terms, filled up to `rows` rows of weights and `width` columns of tokens."""
    filled = jax.tree.map(lambda term: jnp.pad(term, ((0, rows - term.shape[0]), (0, 0))), weights)
    sums = token_group_sums(x_words, recovery.a_format, recovery.k, weights.group_size, width)
    return DecodeGroups(filled, sums)


def words_by_group(
    x_words: UInt32[Array, "planes m words"], group_size: int
) -> UInt32[Array, "planes_of_groups m words"]:
    """The tokens' words once for every group of an instruction, zero outside the group."""
    count = groups_per_instruction(group_size)
    owner = jnp.arange(x_words.shape[-1], dtype=jnp.int32) * WORD_BITS % _INSTRUCTION_K // group_size
    return jnp.concatenate([jnp.where((owner == i)[None, None], x_words, 0) for i in range(count)])


def token_group_sums(
    x_words: UInt32[Array, "planes m words"], a_format: BipolarFormat, k: int, group_size: int, width: int
) -> Int[Array, "groups width"]:
    """Sums of codes over every group; zero in the columns beyond m."""
    counts = lax.population_count(x_words).astype(jnp.int32)
    weights = jnp.asarray(a_format.plane_weights, jnp.int32)[:, None, None]
    groups, words = num_groups(k, group_size), group_size // WORD_BITS
    sums = jnp.sum(counts * weights, axis=0, dtype=jnp.int32)[:, : groups * words]
    sums = jnp.sum(fill_up(sums, words).reshape(sums.shape[0], groups, words), axis=-1, dtype=jnp.int32)
    return jnp.pad(sums.T, ((0, 0), (0, width - sums.shape[0])))


def load_group_terms(
    groups: DecodeGroups, recovery: Recovery, k_slice: Int[Array, ""], product: Int[Array, ""], rows
) -> list[tuple]:
    """Terms of every group in the product-th product of a slice of K.

    Returns:
      (scale, value sums, offset or None) of the weights, the group's length, code sums of the tokens; for each group.
      Groups beyond K have the last group's sums and zero scales and offsets.
    """
    last = num_groups(recovery.k, groups.group_size) - 1
    terms = []
    for i in range(groups.groups_per_instruction):
        group = k_slice * (K_SLICE // groups.group_size) + product * groups.groups_per_instruction + i
        exists = lax.select(group <= last, jnp.float32(1), jnp.float32(0))
        group = jnp.minimum(group, last)
        length = jnp.minimum(groups.group_size, recovery.k - group * groups.group_size)
        row_sums = load_row_vector(groups.weights.row_sums.at[rows, group])
        value_sums = 2 * row_sums - recovery.w_format.max_value * length
        scale = load_row_vector(groups.weights.scale.at[rows, group]) * exists
        offset = (
            None if groups.weights.offset is None else load_row_vector(groups.weights.offset.at[rows, group]) * exists
        )
        terms.append((scale, value_sums, offset, length, load_column_vector(groups.token_sums.at[group])))
    return terms


def add_decode_group(
    sums: Int[Array, "64 width"],
    total: Float[Array, "64 width"],
    terms: tuple,
    zero_code: Int[Array, " width"],
    recovery: Recovery,
) -> Float[Array, "64 width"]:
    """Adds a group: scale times the exact (half) product of values, plus offset times the sum of the tokens' values."""
    scale, value_sums, offset, length, code_sums = terms

    def of_rows(vector):
        return lax.broadcast_in_dim(vector, sums.shape, (0,))

    def of_tokens(vector):
        return lax.broadcast_in_dim(vector, sums.shape, (1,))

    product = plgpu.layout_cast(sums, plgpu.Layout.WGMMA) * recovery.product_weight
    product = product + of_tokens(recovery.row_term(code_sums))
    product = product + of_tokens(recovery.column_weight(zero_code)) * of_rows(value_sums)
    total = total + product.astype(jnp.float32) * of_rows(scale)
    if offset is not None:
        token_values = recovery.token_value_sums(code_sums, zero_code, length).astype(jnp.float32)
        total = total + of_tokens(token_values) * of_rows(offset)
    return total

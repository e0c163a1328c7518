"""Groups of K with scales of their own, in the product of few tokens.

An instruction covers 256 elements of K. Of groups shorter than that, each has columns of its own in
the tokens' operand, zero outside the group; so a product of 256 elements has the sums of all its
groups side by side, and scaling them is all that groups cost.
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
from bipolar_jax.kernels.sm90.core.wgmma import ELEMENTS_PER_ROW
from bipolar_jax.packing.words import WORD_BITS
from bipolar_jax.quantize.groups import num_groups

_INSTRUCTION = 256  # elements of K
PART = ELEMENTS_PER_ROW["planes"]  # elements of K that are loaded at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightGroups:
    """What packed weights have of every group.

    Attributes:
      scale: of the numbers.
      row_sums: of the codes.
      offset: of the numbers; None if all are 0.
      group_size: one of FEW_TOKENS_GROUP_SIZES.
    """

    scale: Float[Array, "n groups"]
    row_sums: Int[Array, "n groups"]
    offset: Float[Array, "n groups"] | None
    group_size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeGroups:
    """The kernel's terms of groups, read from memory where they lie.

    Attributes:
      weights: rows filled up to whole tiles.
      token_sums: of the tokens' codes.
    """

    weights: WeightGroups
    token_sums: Int[Array, "groups width"]

    @property
    def group_size(self) -> int:
        return self.weights.group_size

    @property
    def pieces(self) -> int:
        """Products of one plane that a part of K takes: each of whole groups."""
        return PART // max(_INSTRUCTION, self.group_size)

    @property
    def splits(self) -> int:
        return splits(self.group_size)


def splits(group_size: int | None) -> int:
    """Groups that share an instruction."""
    return 1 if group_size is None else max(1, _INSTRUCTION // group_size)


def decode_groups(
    x_words: UInt32[Array, "planes m words"], weights: WeightGroups, recovery: Recovery, rows: int, width: int
) -> DecodeGroups:
    """The terms for so many rows of weights and columns of tokens."""
    filled = jax.tree.map(lambda term: jnp.pad(term, ((0, rows - term.shape[0]), (0, 0))), weights)
    sums = token_group_sums(x_words, recovery.a_format, recovery.k, weights.group_size, width)
    return DecodeGroups(filled, sums)


def split_words(x_words: UInt32[Array, "planes m words"], group_size: int) -> UInt32[Array, "splits*planes m words"]:
    """The tokens' words once for every group of an instruction, zero outside the group."""
    count = splits(group_size)
    owner = jnp.arange(x_words.shape[-1]) * WORD_BITS % _INSTRUCTION // group_size
    return jnp.concatenate([jnp.where(owner == split, x_words, 0) for split in range(count)])


def token_group_sums(
    x_words: UInt32[Array, "planes m words"], a_format: BipolarFormat, k: int, group_size: int, width: int
) -> Int[Array, "groups width"]:
    """Sums of codes of every group; zero for the tokens that are not there."""
    counts = lax.population_count(x_words).astype(jnp.int32)
    weights = jnp.asarray(a_format.plane_weights, jnp.int32)[:, None, None]
    groups, words = num_groups(k, group_size), group_size // WORD_BITS
    sums = jnp.sum(counts * weights, axis=0)[:, : groups * words]
    sums = jnp.sum(fill_up(sums, words).reshape(sums.shape[0], groups, words), axis=-1)
    return jnp.pad(sums.T, ((0, 0), (0, width - sums.shape[0])))


def load_group_terms(
    groups: DecodeGroups, recovery: Recovery, part: Int[Array, ""], piece: Int[Array, ""], rows
) -> list[tuple]:
    """Of every group in a piece of a part of K: the weights' scale, value sums, offset; length; the tokens' code sums.

    Beyond K scales and offsets are zero, and whatever they multiply is finite.
    """
    last = num_groups(recovery.k, groups.group_size) - 1
    terms = []
    for split in range(groups.splits):
        group = part * (PART // groups.group_size) + piece * groups.splits + split
        is_there = (group <= last).astype(jnp.float32)
        group = jnp.minimum(group, last)
        length = jnp.minimum(groups.group_size, recovery.k - group * groups.group_size)
        row_sums = load_row_vector(groups.weights.row_sums.at[rows, group])
        value_sums = 2 * row_sums - recovery.w_format.max_value * length
        scale = load_row_vector(groups.weights.scale.at[rows, group]) * is_there
        offset = (
            None if groups.weights.offset is None else load_row_vector(groups.weights.offset.at[rows, group]) * is_there
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
    """Adds a group: its scale times the exact (half) product of values, its offset times the sum of the tokens'."""
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

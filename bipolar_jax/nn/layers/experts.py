"""Stacks of linear layers of which every token runs a few: tokens are sorted into blocks of one expert each.

A block is a batch of tokens that go to one expert; `run_experts` multiplies block after block with the weights of its
expert, so that of a stack the chosen experts' weights alone are read. Up to the smallest block, `SMALLEST_BLOCK`
tokens, every chosen expert has one block: its weights are read once. Sorting by expert is that of MegaBlocks (arXiv
2211.15841), with a loop over blocks in place of its kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.nn.layers.linear import Linear, fuses
from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.ops import Activation
from bipolar_jax.ops.matmul import vary_alike
from bipolar_jax.packing.columns import fill_tiles, side_by_side

# Rows of a block: of few tokens all of them, else the power of two that an expert has on average, within these bounds.
# More rows read an expert's weights less often; fewer leave fewer rows of the last block of each expert empty.
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertBlocks:
    """Which tokens are in which block, and which expert a block goes to.

    What always holds: a token is in one row for each expert that it goes to; all rows of a block go to its expert;
    blocks that are used come first.

    Attributes:
      experts: the expert of each block; any expert for a block that is not used.
      sources: the token of each row; the number of tokens for a row that is empty.
      places: the row, counted over all blocks, of each token for each of its experts.
      is_used: whether a block has tokens; None for one token, which all blocks have.
      weights: what the output of each row is multiplied with; 0 in empty rows.
    """

    experts: Int[Array, " blocks"]
    sources: Int[Array, "blocks rows"]
    places: Int[Array, "tokens chosen"]
    is_used: Bool[Array, " blocks"] | None
    weights: Float[Array, "blocks rows"]

    @classmethod
    def of(
        cls, chosen: Int[Array, "tokens chosen"], weights: Float[Array, "tokens chosen"], count: int
    ) -> ExpertBlocks:
        """The blocks of tokens that go to these experts, each to different ones, of so many."""
        tokens, per_token = chosen.shape
        num_blocks, size = block_shape(tokens, per_token, count)
        if tokens == 1:
            experts = chosen[0].astype(jnp.int32)
            places = jnp.arange(per_token, dtype=jnp.int32)[None]
            return cls(experts, jnp.zeros((per_token, 1), jnp.int32), places, None, weights.T)
        pairs = chosen.reshape(-1)
        order = jnp.argsort(pairs, stable=True)
        numbers = jnp.zeros(count, jnp.int32).at[pairs].add(1)
        blocks_to = jnp.cumsum(-(-numbers // size), dtype=jnp.int32)
        first_block = blocks_to - -(-numbers // size)
        rank = (
            jnp.arange(tokens * per_token, dtype=jnp.int32)
            - (jnp.cumsum(numbers, dtype=jnp.int32) - numbers)[pairs[order]]
        )
        rows = first_block[pairs[order]] * size + rank
        places = jnp.zeros_like(rows).at[order].set(rows)
        sources = jnp.full(num_blocks * size, tokens, jnp.int32).at[rows].set((order // per_token).astype(jnp.int32))
        of_rows = jnp.zeros(num_blocks * size, weights.dtype).at[rows].set(weights.reshape(-1)[order])
        index = jnp.arange(num_blocks, dtype=jnp.int32)
        # Compares all, where the default search is a loop of kernels.
        found = jnp.searchsorted(blocks_to, index, side="right", method="compare_all")
        experts = jnp.minimum(found, count - 1).astype(jnp.int32)
        sources, of_rows = (array.reshape(num_blocks, size) for array in (sources, of_rows))
        return cls(experts, sources, places.reshape(tokens, per_token), index < blocks_to[-1], of_rows)

    def gather(self, x: Float[Array, "tokens k"]) -> Float[Array, "blocks rows k"]:
        """The tokens of every row; zeros in empty rows."""
        return jnp.take(x, self.sources, axis=0, mode="fill", fill_value=0)

    def scatter(self, y: Float[Array, "blocks rows n"]) -> Float[Array, "tokens n"]:
        """The weighted sum of the rows of every token, in the order of its experts, float32."""
        rows = jnp.take(y.reshape(-1, y.shape[-1]), self.places, axis=0).astype(jnp.float32)
        weights = jnp.take(self.weights.reshape(-1), self.places, axis=0)
        return jnp.einsum("tcn,tc->tn", rows, weights, precision=jax.lax.Precision.HIGHEST)


def block_shape(tokens: int, per_token: int, count: int) -> tuple[int, int]:
    """The largest number of blocks that tokens can need, and the rows of each.

    Args:
      tokens: number of tokens.
      per_token: experts that each of them goes to, all different.
      count: experts in all.
    """
    pairs = tokens * per_token
    average = 1 << max(0, -(-pairs // count) - 1).bit_length()
    size = min(tokens, max(SMALLEST_BLOCK, min(average, LARGEST_BLOCK)))
    # The most blocks: as many experts as can be have one token more than fills blocks.
    touched = min(count, pairs)
    return touched + (pairs - touched) // size, size


@runtime_checkable
class RunsExperts(Protocol):
    """What stands in for a stack of layers in `run_experts`, for example to record what enters it."""

    def run_experts(
        self, x: Float[Array, "blocks rows k"], blocks: ExpertBlocks, activation: Activation | None
    ) -> Float[Array, "blocks rows n"]:
        """As `run_experts`, without a prologue."""


def run_experts(
    stack: nnx.Linear | Linear | RunsExperts,
    x: Float[Array, "blocks rows k"],
    blocks: ExpertBlocks,
    prologue: Activation | None = None,
    activation: Activation | None = None,
) -> Float[Array, "blocks rows n"]:
    """The product of every block with the weights of its expert.

    Float variables get gradients, which are added up expert by expert; packed ones have none.

    Args:
      stack: a float or packed layer whose arrays have a leading axis of experts.
      x: the rows of the blocks, from `ExpertBlocks.gather`; those of blocks that are not used do not matter.
      blocks: the experts.
      prologue: of x, if the stack fuses (`nn.fuses`).
      activation: of the product, if the stack fuses.

    Returns:
      The product in the layer's dtype; zeros in blocks that are not used, for which no weights are read.
    """
    if isinstance(stack, RunsExperts):
        return stack.run_experts(x, blocks, activation)
    variables, structure = jax.tree.flatten(stack, is_leaf=_is_variable)
    floats = [variable if _has_gradient(variable) else None for variable in variables]
    others = [None if _has_gradient(variable) else variable for variable in variables]
    options = (prologue, activation) if fuses(stack) else (None, None)
    floats, others, x, experts, is_used = vary_alike((floats, others, x, blocks.experts, blocks.is_used))
    return _products((structure, *options), floats, others, x, experts, is_used)


def merges_columns(stack: Any, activation: Activation | None = None) -> bool:
    """Whether `run_side_by_side` serves a stack: a packed one that fuses, without biases, whose columns fill tiles.

    An activation in the product has to be one that its weights are laid out for.
    """
    if not fuses(stack) or stack.bias is not None or stack.k_axes is not None:
        return False
    kernel = stack.kernel.get_value()
    return fill_tiles(kernel) and (activation is None or getattr(kernel, "gated", False))


def side_by_side_layer(stack: Linear, experts: Int[Array, " chosen"]) -> Linear:
    """One layer with the columns of these experts side by side."""
    kernel = jax.tree.map(lambda leaf: jnp.take(leaf, experts, axis=0), stack.kernel.get_value())
    layer = nnx.clone(stack, variables=False)
    layer.kernel = Packed(side_by_side(kernel))
    layer.out_features = layer.kernel.shape[-1]
    return layer


def run_side_by_side(
    stack: Linear, x: Float[Array, "1 k"], experts: Int[Array, " chosen"], activation: Activation | None = None
) -> Float[Array, "chosen 1 n"]:
    """One token's product with the weights of each of its experts, as `run_experts` gives it: by one product.

    The experts' columns are gathered side by side. It is the way of a stack that `merges_columns`.
    """
    out = side_by_side_layer(stack, experts)(x, activation=activation)
    return out.reshape(len(experts), 1, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(static: tuple, floats: Sequence[Any], others: Sequence[Any], x, experts, is_used):
    def step(_, block):
        rows, expert, used = block

        def product(rows):  # slices the stack within the branch of a block that is used
            return _product(static, _of_expert(floats, expert), _of_expert(others, expert), rows)

        return None, _if_used(used, product, rows)

    return jax.lax.scan(step, None, (x, experts, is_used))[1]


def _forward(static, floats, others, x, experts, is_used):
    return _products(static, floats, others, x, experts, is_used), (floats, others, x, experts, is_used)


def _backward(static, operands, cotangents):
    """Differentiates block by block; a block's gradients are added to those of its expert, in place."""
    floats, others, x, experts, is_used = operands

    def step(sums, block):
        rows, expert, used, cotangent = block

        def gradients(rows, cotangent):
            product = lambda own, rows: _product(static, own, _of_expert(others, expert), rows)  # noqa: E731
            return jax.vjp(product, _of_expert(floats, expert), rows)[1](cotangent)

        of_expert, of_rows = _if_used(used, gradients, rows, cotangent)
        return jax.tree.map(lambda total, part: total.at[expert].add(part), sums, of_expert), of_rows

    start = jax.tree.map(jnp.zeros_like, floats)
    of_floats, of_x = jax.lax.scan(step, start, (x, experts, is_used, cotangents))
    return of_floats, None, of_x, None, None


_products.defvjp(_forward, _backward)


def _product(static: tuple, floats: Sequence[Any], others: Sequence[Any], rows: Float[Array, "rows k"]):
    """That of one expert, from its variables."""
    structure, prologue, activation = static
    variables = [other if own is None else own for own, other in zip(floats, others, strict=True)]
    layer = jax.tree.unflatten(structure, variables)
    return layer(rows, prologue, activation=activation) if fuses(layer) else layer(rows)


def _of_expert(stacked: Any, expert: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), stacked)


def _if_used(used: Bool[Array, ""] | None, function, *operands):
    """function(*operands), or zeros of its shapes without running it."""
    if used is None:
        return function(*operands)

    def zeros(*operands):
        shapes = jax.eval_shape(function, *operands)
        made = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return vary_alike((made, operands))[0]

    return jax.lax.cond(used, function, zeros, *operands)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _has_gradient(variable: Any) -> bool:
    """Whether it is a variable of floats, and no packed array."""
    leaves = jax.tree.leaves(variable)
    return not isinstance(variable, Packed) and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)

"""Which warpgroups quantize which token, and how the blocks of a pair exchange the tokens of several texts.

Every block multiplies the tokens of all texts. A token of one text is quantized by the four warpgroups of every block.
Of several texts, the two blocks of a cluster, a pair, quantize half of the texts each, all at the same time: a
warpgroup, or two, or four, are the team of a text. A block sends the other what its products need of a token: bytes,
every warp's sum of codes, and the grid (`core.cluster`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import as_integer, when
from bipolar_jax.kernels.sm90.core.cluster import MAILBOX_WORDS, Section, await_mail, expect_mail, send_mail
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted, with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, WARPS, as_splat, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import (
    PAIR,
    PRODUCTS,
    TEXT_SLICE_WORDS,
    WARPGROUPS,
    LayersShape,
    Product,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import BLOCK_WARPS, reduce_warpgroups

_GRID_WORDS = 4  # scale, zero code, and two that are not used


class Team(NamedTuple):
    """The warpgroups that quantize a token.

    Attributes:
      text: whose token.
      exists: whether there is such a text; True if that is known.
      first, count: of the warpgroups.
      part: index of the calling one among them.
    """

    text: Int[Array, ""] | int
    exists: Bool[Array, ""] | bool
    first: Int[Array, ""] | int
    count: int
    part: Int[Array, ""]


def team_of(shape: LayersShape, rank: Int[Array, ""] | int, warpgroup: Int[Array, ""]) -> Team:
    """The team of a warpgroup; `rank` is the block's index in its pair."""
    if shape.texts == 1:
        return Team(0, True, 0, WARPGROUPS, warpgroup)
    index, count = lax.div(warpgroup, shape.warpgroups_of_text), shape.warpgroups_of_text
    text, exists = index * PAIR + rank, True
    if shape.texts % PAIR:
        text, exists = jnp.minimum(text, shape.texts - 1), text < shape.texts
    return Team(text, exists, index * count, count, lax.rem(warpgroup, count))


def ranks_of(block: Int[Array, ""]) -> list[Int[Array, ""] | int]:
    """The ranks in a pair for which a block quantizes: its own; or both in interpret mode, which has no clusters."""
    return list(range(PAIR)) if is_interpreted() else [lax.rem(block, PAIR)]


def token_sums_shape(shape: LayersShape) -> tuple[int, int]:
    """Of what passes beside a token's bytes, int32: of each text, every warp's sum of codes, then its grid.

    The last row is the mailbox of the block.
    """
    return (1, BLOCK_WARPS) if shape.texts == 1 else (shape.texts + 1, BLOCK_WARPS + _GRID_WORDS)


def mailbox_of(shape: LayersShape, token_sums: Any) -> Any:
    """The mailbox, for `core.cluster`."""
    return token_sums.at[shape.texts, pl.ds(0, MAILBOX_WORDS)]


def rows_of(product: Product, block: Int[Array, ""]) -> Int[Array, ""]:
    """Rows of a product that are a block's; not positive if it has none."""
    return product.counted_rows - block * product.rows


def exchange_tokens(
    shape: LayersShape,
    name: str,
    layer: Int[Array, ""],
    team: Team,
    operand: Any,
    token_sums: Any,
    block: Int[Array, ""],
    meet: Callable[[], None],
) -> None:
    """Sends a team's token to the other block of the pair, and waits until all tokens are in this block.

    Only a block that has rows of the product expects anything, which ends a phase of its mailbox. The other sends after
    it has polled whole tokens. They depend on what this block computed before from the tokens that are overwritten.

    Args:
      shape: of the layers.
      name: of the product.
      layer: counted from the first that is computed.
      team: of this warpgroup.
      operand: shared memory, the bytes of all tokens.
      token_sums: shared memory of `token_sums_shape`.
      block: index of this block.
      meet: waits for all consumer warpgroups of the block.
    """
    product, mailbox, other = shape.products[name], mailbox_of(shape, token_sums), block ^ 1
    # Texts take turns with the ranks.
    of_other = lax.div(shape.texts + PAIR - 1 - (other & 1), PAIR)
    size_of_text = product.all_k_slices * K_SLICE + 4 * WARPS * team.count + 4 * _GRID_WORDS
    has_rows = rows_of(product, block) > 0

    @when(has_rows & (team.first + team.part == 0))
    def _():
        expect_mail(mailbox, of_other * size_of_text)

    sections = []
    for i in range(shape.slices_of_warpgroup(name)):
        k_slice = team.part + i * team.count
        sent = True if (i + 1) * team.count <= product.all_k_slices else k_slice < product.all_k_slices
        row = k_slice * shape.texts + team.text
        sections.append(Section(0, row * (4 * TEXT_SLICE_WORDS), K_SLICE, sent))
    row = team.text * (4 * token_sums.shape[1])
    sections.append(Section(1, row + (team.first + team.part) * (4 * WARPS), 4 * WARPS, True))
    sections.append(Section(1, row + 4 * BLOCK_WARPS, 4 * _GRID_WORDS, team.part == 0))
    send_mail(mailbox, [operand, token_sums], sections, team.exists & (rows_of(product, other) > 0))
    meet()

    @when(has_rows)
    def _():
        ended = [as_integer(rows_of(other_product, block) > 0) for other_product in shape.products.values()]
        await_mail(mailbox, layer * sum(ended) + sum(ended[: PRODUCTS.index(name)]))


def sum_of_codes(shape: LayersShape, token_sums: Any, text: Int[Array, ""] | int) -> Int[Array, ""]:
    """The sum of the codes of a text's token, whose team may be of the other block."""
    count = shape.warpgroups_of_text
    return reduce_warpgroups(
        token_sums.at[text], lax.div(text, PAIR) * count if count < WARPGROUPS else 0, count, "sum"
    )


def _store_grid_twin(token_sums, text, scale, zero_code):
    token_sums[text, BLOCK_WARPS] = lax.bitcast_convert_type(scale, jnp.int32)
    token_sums[text, BLOCK_WARPS + 1] = zero_code


@with_twin(_store_grid_twin)
def store_grid(token_sums: Any, text: Int[Array, ""], scale: Float[Array, ""], zero_code: Int[Array, ""]) -> None:
    """Stores the grid of a text's token; called by one warpgroup."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[SPLAT] * 3))
    def inline(_, token_sums, text, scale, zero_code):
        with ptx.when(ptx.equal(thread_index(), 0)):
            ptx.store(_grid(token_sums, text), [ptx.as_word(scalar_of(scale)), scalar_of(zero_code)])

    inline(token_sums, jnp.int32(text), scale, zero_code)


def _load_grid_twin(token_sums, text):
    scale = lax.bitcast_convert_type(token_sums[text, BLOCK_WARPS], jnp.float32)
    return scale, token_sums[text, BLOCK_WARPS + 1]


@with_twin(_load_grid_twin)
def load_grid(token_sums: Any, text: Int[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The scale and the zero code of a text's token."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT),
        return_type=[plgpu.ShapeDtypeStruct((), dtype, layout=SPLAT) for dtype in (jnp.float32, jnp.int32)],
    )
    def inline(_, token_sums, text):
        scale, zero_code = ptx.load(_grid(token_sums, text), 2)
        return [as_splat(ptx.as_float(scale), None), as_splat(zero_code, True)]

    return tuple(inline(token_sums, jnp.int32(text)))


def _grid(token_sums: Any, text: Any) -> ptx.Pointer:
    row = 4 * (BLOCK_WARPS + _GRID_WORDS)
    return ptx.advance(ptx.advance_far(ptx.pointer(token_sums, ptx.SHARED), scalar_of(text), row), 4 * BLOCK_WARPS)

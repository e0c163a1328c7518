"""A stage of a product whose groups have float scales: weights to the tensor cores, sums of chunks to float32.

With unsigned codes u of weights and t of tokens, a chunk of K in which no group ends adds

    S * P + q * T,     P = sum_k t u,     T = sum_k t,     q = S * Z + o,

to a row's float32 sum; S, Z and o are the chunk's terms (`packing.float_terms`), and q is the number of code 0. P and T
are exact, below 2^24. P begins at zero, which costs no instruction, and is never converted: a word below 2^24 that is
read as a float32 is the word times 2^-149, a subnormal number or one of the smallest normal ones, which a multiply-add
takes as any other number. So S comes times 2^80, q times 2^-69, and sums are in units of 2^69, for which the epilogue
makes up. Scaling is two multiply-adds a number and chunk.

Each multiply-add rounds once. With K in C chunks a sum is off by at most 2 C * 2^-24 times the largest partial sum,
which is at most sum_k t (|S| u + |q|): the worst case. In units of 2^69 what is below 2^-126 has fewer digits, so that
at most 2 C * 2^-81 comes on top. Scales from 2^47 on overflow, to Inf or NaN.

A unit is a chunk's product with the 64 rows of one block of the tile. While a unit of 64 tokens is multiplied, T is
added for it, and P of the unit before. Units of 128 tokens leave registers for one P: it is added before the next unit
starts, while the tensor cores multiply the other consumer's. A weight is then expanded once for 128 tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragment_wgmma import hidden_zero, pinned, settled, start_unsigned, wait
from bipolar_jax.kernels.sm90.core.fragments import as_array, lane_and_warp, numbers_of
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion, StepWords
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import FloatScaling
from bipolar_jax.packing.fields import PARTS, STAGE, STEPS, TILE_ROWS, WORDS_PER_VECTOR, expand_tile
from bipolar_jax.packing.float_terms import FloatTerms, part_float_terms, term_words

BLOCKS = 2  # of a tile
SUMS_ORDER = 16  # tokens whose sums `in_order_of_lanes` permutes
BLOCK_ROWS = TILE_ROWS // BLOCKS
_BLOCK_REGISTERS = 4  # of A, in one step
_MOST_ALTERNATING = 64  # tokens of a unit beside which there are registers for the sums of another
_LOADS_AHEAD = 4  # of token sums: ptxas would load all of 128 tokens at once, and spill
_MOST_KEPT_BITS = 4  # wider fields are loaded for either block again: they would take too many registers
_SCALE_FACTOR, _SUM_FACTOR = 2.0**80, 2.0**-69
SUM_UNIT = 1 / _SUM_FACTOR


@dataclasses.dataclass(frozen=True)
class ChunkScaling:
    """How sums of chunks are scaled; static.

    Attributes:
      format: of the weights' codes.
      kind: the form of the terms.
      chunks: of a stage.
    """

    format: BipolarFormat
    kind: FloatTerms
    chunks: int

    def load(self, terms: Pointer, chunk: int, block: int) -> tuple[list[Value], list[Value]]:
        """S * 2^80 and q * 2^-69 of a lane's rows 8 p + lane / 4 of a block."""
        lane, warp = lane_and_warp()
        part = ptx.advance(terms, ptx.times(warp, 4 * term_words(self.kind, self.chunks)))
        scales, first_numbers = [], []
        rows = FloatScaling(self.kind, -self.format.max_value / 2).load_terms(part, chunk, lane)
        for scale, zero, offset in rows[2 * block : 2 * (block + 1)]:
            number = ptx.multiply(scale, zero) if offset is None else ptx.fma(scale, zero, offset)
            scales.append(ptx.multiply(scale, ptx.float32(_SCALE_FACTOR)))
            first_numbers.append(ptx.multiply(number, ptx.float32(_SUM_FACTOR)))
        return scales, first_numbers

    def of_tile(self, terms: Array) -> tuple[Float[Array, "rows chunks"], Float[Array, "rows chunks"]]:
        """S and q of a tile's rows, in jnp."""
        scale, zero, offset = part_float_terms(terms, self.format, self.kind)
        number = scale * zero if offset is None else scale * zero + offset
        return tuple(
            term.reshape(PARTS, BLOCKS, -1, self.chunks).swapaxes(0, 1).reshape(TILE_ROWS, self.chunks)
            for term in (scale, number)
        )


def _add_stage_twin(total, tokens, words, terms, token_sums, scaling, before=None):
    del before
    codes, sums = expand_tile(words[...], None).astype(jnp.float32), _in_order_of_columns(token_sums[...])
    token_codes = lax.bitcast_convert_type(tokens[...], jnp.uint8).reshape(-1, STAGE).astype(jnp.float32)
    scale, number = scaling.of_tile(terms[...])
    # The hardware reads tokens through the async proxy. The race detector sees ordinary reads here, which must be
    # ordered before the next TMA write.
    plgpu.commit_smem()
    by_chunk = (side.reshape(side.shape[0], scaling.chunks, -1) for side in (codes, token_codes))
    # At most 128 * 255 * 255: exact in float32.
    products = jnp.einsum("rck,tck->crt", *by_chunk, precision=lax.Precision.HIGHEST)
    for chunk in range(scaling.chunks):
        total = total + number[:, chunk, None] * _SUM_FACTOR * sums[chunk][None]
        total = total + scale[:, chunk, None] * _SUM_FACTOR * products[chunk]
    return jnp.zeros((BLOCK_ROWS, total.shape[1]), jnp.int32), total


@with_twin(_add_stage_twin)
def add_stage(
    total: Float[Array, "rows tokens"],
    tokens,
    words,
    terms,
    token_sums,
    scaling: ChunkScaling,
    before: tuple[Int[Array, "block_rows tokens"], Any] | None = None,
) -> tuple[Int[Array, "block_rows tokens"], Float[Array, "rows tokens"]]:
    """Adds a stage to the sums, but for P of its last unit, which is still in flight.

    When it returns, the stage before may be overwritten: only this one's last unit is in flight. Across the back edge
    of a loop none may be, or ptxas serializes all products (warning C7514).

    Args:
      total: [TILE_ROWS, tokens] in the layout `wgmma.ACCUMULATOR`: the sums so far, in units of SUM_UNIT.
      tokens: ref in shared memory, unsigned bytes as uint32 [tokens, 32] with `wgmma.TILE_TRANSFORMS`.
      words: likewise, uint32 [PARTS, bits, WORDS_PER_VECTOR], one tile and stage of prepared weights.
      terms: likewise, uint32 [PARTS, vectors, words].
      token_sums: likewise, T as float32 [chunks, tokens], `in_order_of_lanes`.
      scaling: how sums of chunks are scaled.
      before: P of the last unit of the stage before, if it is in flight, and that stage's `terms`.

    Returns:
      P of this stage's last unit, and total.
    """
    shapes = (BLOCK_ROWS, total.shape[1]), total.shape

    @plgpu.inline_mgpu(
        arg_types=(
            wgmma.ACCUMULATOR,
            plgpu.RefType(wgmma.TILE_TRANSFORMS),
            *[plgpu.RefType()] * 3,
            *(() if before is None else (wgmma.ACCUMULATOR, plgpu.RefType())),
        ),
        return_type=tuple(
            plgpu.ShapeDtypeStruct(shape, dtype, layout=wgmma.ACCUMULATOR)
            for shape, dtype in zip(shapes, (jnp.int32, jnp.float32), strict=True)
        ),
    )
    def inline(_, total, tokens, words, terms, token_sums, *before):
        words, terms, token_sums = (ptx.pointer(ref, ptx.SHARED) for ref in (words, terms, token_sums))
        before = (numbers_of(before[0]), ptx.pointer(before[1], ptx.SHARED)) if before else None
        totals = by_block(numbers_of(total))
        started = add_units(totals, tokens, words, terms, token_sums, scaling, total.shape[1], before)
        acc = as_array(started, shapes[0], wgmma.ACCUMULATOR, is_signed=True)
        return acc, as_array([n for block in totals for n in block], shapes[1], wgmma.ACCUMULATOR)

    return inline(total, tokens, words, terms, token_sums, *(before or ()))


@with_twin(lambda pending, total, terms, scaling: total)
def add_pending(
    pending: Int[Array, "block_rows tokens"], total: Float[Array, "rows tokens"], terms, scaling: ChunkScaling
) -> Float[Array, "rows tokens"]:
    """The finished sums: adds P of the last unit. Arguments as `add_stage` has them, `terms` of the last stage."""

    @plgpu.inline_mgpu(
        arg_types=(wgmma.ACCUMULATOR, wgmma.ACCUMULATOR, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=wgmma.ACCUMULATOR),
    )
    def inline(_, pending, total, terms):
        totals = by_block(numbers_of(total))
        scales, _ = scaling.load(ptx.pointer(terms, ptx.SHARED), scaling.chunks - 1, BLOCKS - 1)
        add_products(totals, BLOCKS - 1, scales, numbers_of(pending), in_flight=0)
        return as_array([n for block in totals for n in block], total.shape, wgmma.ACCUMULATOR)

    return inline(pending, total, terms)


def zeros(tokens: int) -> jax.Array:
    """Sums to begin with."""
    return plgpu.layout_cast(jnp.zeros((TILE_ROWS, tokens), jnp.float32), wgmma.ACCUMULATOR)


# Below: what threads do, within `plgpu.inline_mgpu`.


def by_block(numbers: list[Value]) -> list[list[Value]]:
    """A thread's numbers of a tile, those of either block."""
    half = len(numbers) // BLOCKS
    return [numbers[:half], numbers[half:]]


def add_units(
    totals: list[list[Value]],
    tokens: Value,
    words: Pointer,
    terms: Pointer,
    token_sums: Pointer,
    scaling: ChunkScaling,
    width: int,
    before: tuple[list[Value], Pointer] | None,
) -> list[Value]:
    """`add_stage`, of a thread.

    Args:
      totals: sums by block, which are updated: number 4 j + 2 p + e is of row 8 p + lane / 4 of the warp's 16, and
        column 8 j + 2 (lane % 4) + e.
      tokens, words, terms, token_sums, scaling, before: as there, in shared memory.
      width: tokens.

    Returns:
      P of the last unit, in flight.
    """
    lane, warp = lane_and_warp()
    expansion, unit, zero = Expansion(scaling.format.bits, 0), None, hidden_zero(tokens)
    words = ptx.advance(words, ptx.times(warp, 4 * expansion.bits * WORDS_PER_VECTOR))
    if before is not None:
        unit = BLOCKS - 1, scaling.load(before[1], scaling.chunks - 1, BLOCKS - 1)[0], before[0]
    alternating, steps = width <= _MOST_ALTERNATING, STEPS // scaling.chunks
    at_once = steps if alternating else min(steps, HALF_STEPS)
    for chunk in range(scaling.chunks):
        fields = None
        for block in range(BLOCKS):

            def fragments_from(first: int, block: int = block) -> list[list[Value]]:
                nonlocal fields
                if fields is None or not alternating or expansion.bits > _MOST_KEPT_BITS:
                    fields = _fields_of(expansion, words, lane, first, at_once)
                registers = range(_BLOCK_REGISTERS * block, _BLOCK_REGISTERS * (block + 1))
                return [[expansion.codes(field, register) for register in registers] for field in fields]

            first, *rest = range(chunk * steps, (chunk + 1) * steps, at_once)
            if unit is not None and rest:
                wait(in_flight=1)  # the fragments of the unit's first half are free
            fragments, settled_sums = fragments_from(first), None
            if unit is not None and not alternating:
                fragments = [pinned(step) for step in fragments]
                settled_sums = add_products(totals, *unit, in_flight=0)
            started = start_unsigned(fragments, tokens, first, width, replace=settled_sums)
            scales, numbers = scaling.load(terms, chunk, block)
            totals[block] = _with_token_sums(totals[block], numbers, token_sums, lane, chunk, width, zero)
            for start in rest:
                started = start_unsigned(fragments_from(start), tokens, start, width, add_to=started)
            if unit is not None and alternating:
                add_products(totals, *unit, in_flight=1)
            unit = block, scales, started
    return unit[-1]


def _fields_of(expansion: Expansion, words: Pointer, lane: Value, first: int, count: int) -> list[StepWords]:
    """A lane's words of `count` steps of a stage; what is loaded beyond them is never used, and dropped."""
    per_half = STEPS // HALVES
    halves = range(first // per_half, (first + count - 1) // per_half + 1)
    fields = [step for half in halves for step in expansion.load_fields(words, lane, half)]
    start = first - halves[0] * per_half
    return fields[start : start + count]


def in_order_of_lanes(token_sums: Float[Array, "*batch tokens"]) -> Float[Array, "*batch tokens"]:
    """Sums of tokens, a multiple of 16, so that a lane loads those of its columns 8 j + 2 (lane % 4) + e by fours."""
    by_column = token_sums.reshape(*token_sums.shape[:-1], -1, 2, 4, 2)
    return by_column.swapaxes(-3, -2).reshape(token_sums.shape)


def _in_order_of_columns(token_sums: Float[Array, "*batch tokens"]) -> Float[Array, "*batch tokens"]:
    """The inverse of `in_order_of_lanes`."""
    by_lane = token_sums.reshape(*token_sums.shape[:-1], -1, 4, 2, 2)
    return by_lane.swapaxes(-3, -2).reshape(token_sums.shape)


def _with_token_sums(
    totals: list[Value], factors: list[Value], token_sums: Pointer, lane: Value, chunk: int, width: int, zero: Value
) -> list[Value]:
    """The totals of a block, in the order of `add_units`, plus factors of rows p times T of columns 2 j + e.

    Args:
      totals: of the block.
      factors: two, of its rows.
      token_sums, lane, chunk, width: as `add_units` has them.
      zero: `hidden_zero`, by which the address of a load depends on what the load _LOADS_AHEAD before it found.
    """
    mine = ptx.advance(token_sums, ptx.plus(ptx.times(ptx.bits_of(lane, 3), 16), 4 * chunk * width))
    added: list[Value] = []
    loaded: list[Value] = []
    for number in range(width // SUMS_ORDER):
        waited = ptx.bits_of(loaded[number - _LOADS_AHEAD], zero) if number >= _LOADS_AHEAD else 0
        words = ptx.load(ptx.advance(ptx.advance(mine, waited), 4 * SUMS_ORDER * number), 4)
        loaded.append(words[0])
        for i in range(8):
            token_sum = ptx.as_float(words[2 * (i // 4) + i % 2])
            added.append(ptx.fma(factors[i // 2 % 2], token_sum, totals[len(added)]))
    return added


def add_products(
    totals: list[list[Value]], block: int, scales: list[Value], products: list[Value], *, in_flight: int
) -> list[Value]:
    """Adds a unit's P to the totals of its block, when it has come; returns P."""
    products = settled(products, in_flight=in_flight)
    added = [ptx.fma(scales[i // 2 % 2], ptx.as_float(products[i]), total) for i, total in enumerate(totals[block])]
    # Pinned: the next unit may then take the registers of this one's products.
    totals[block] = pinned(added)
    return products

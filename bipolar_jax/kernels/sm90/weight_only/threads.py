"""What the threads of a warpgroup do in the product of float activations: unpack, multiply, scale, finish.

Warps share out K: each takes chunks of 128 elements, of which a lane has one word of every row, and
multiplies it with all tokens; so what is loaded of the tokens serves all rows of a tile. Which elements meet in
an instruction is free, as long as they are the same of both operands: a lane's 32 elements of a row are 16 pairs of
elements e and e + 16, two of them in each of eight instructions.

Functions of values are written in `instructions` alone, so that tests can run them for all threads in numpy.
"""

from __future__ import annotations

import functools

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.hardware import WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import GLOBAL, SHARED, Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.weight_only.config import CHUNK, PART, TILE_ROWS, WARPS, WeightOnlyShape
from bipolar_jax.kernels.sm90.weight_only.unpack import PAIRS, unpack

_STEPS = PAIRS // 2  # instructions of a chunk
_CHUNKS = PART // CHUNK
_BLOCK = 8  # tokens of an instruction
_WORD_ELEMENTS = 32

Sums = list[Value]  # of rows r and r + 8, columns 2 q and 2 q + 1, by blocks of tokens, by rows of instructions


def place() -> tuple[Value, Value, Value]:
    """This thread's warp, and its row r and position q in an instruction."""
    thread = ptx.opaque(ptx.thread_in_warpgroup())
    lane = ptx.bits_of(thread, WARP - 1)
    return ptx.shift_right(thread, 5), ptx.shift_right(lane, 2), ptx.bits_of(lane, 3)


def add_part(
    shape: WeightOnlyShape, sums: Sums, x_sums: Sums, planes, x, scale, offset, part: Value, first_row: Value
) -> tuple[Sums, Sums]:
    """Adds a part of K, all planes of which are in shared memory.

    Args:
      shape: of the product.
      sums: of values times activations; with groups of scaled ones, offsets included.
      x_sums: of the activations, if there are offsets and no groups; else empty.
      planes: [planes, rows, 32 words], swizzled.
      x: [m, k] in memory.
      scale, offset: [n, groups] in memory; offset None if there is none.
      part: which.
      first_row: of the tile.
    """
    warp, row, quad = place()
    values, count = [*sums, *x_sums], len(sums)
    for turn in range(_CHUNKS // WARPS):
        piece = ptx.plus(warp, turn * WARPS)
        chunk = ptx.plus(ptx.times(part, _CHUNKS), piece)
        add = functools.partial(
            _add_chunk, shape, values, count, planes, x, scale, offset, piece, chunk, first_row, row, quad
        )
        values = ptx.update_if(ptx.less(chunk, shape.k // CHUNK), values, add)
    return values[:count], values[count:]


def _add_chunk(shape, values, count, planes, x, scale, offset, piece, chunk, first_row, row, quad) -> list[Value]:
    sums, x_sums = list(values[:count]), list(values[count:])
    blocks = range(shape.width // _BLOCK)
    tokens = [_load_tokens(shape, ptx.pointer(x, GLOBAL), block, chunk, row, quad) for block in blocks]
    grouped = shape.group_size is not None
    ones = [ptx.int32(shape.number.one_word * 0x10001)] * (2 * PAIRS)
    zeros = [ptx.float32(0)] * 4
    parts = [[_of_split(shape, split, pairs, quad) for pairs in tokens] for split in range(shape.splits)]
    totals = [[multiplied(shape, ones, pairs, zeros) for pairs in part] for part in parts] if shape.offset else None
    if shape.offset and not grouped:
        x_sums = [ptx.add(a, b) for a, b in zip(x_sums, [n for four in totals[0] for n in four], strict=True)]
    for tile in range(shape.row_tiles):
        weights = _load_weights(shape, planes, tile, piece, row, quad)
        for split, part in enumerate(parts):
            if grouped:
                group = group_of(shape, chunk, split)
                scales = _row_terms(shape, scale, first_row, tile, row, group)
                offsets = _row_terms(shape, offset, first_row, tile, row, group) if shape.offset else None
            for block, pairs in enumerate(part):
                start = 4 * (tile * len(blocks) + block)
                before = sums[start : start + 4]
                if not grouped:
                    sums[start : start + 4] = multiplied(shape, weights, pairs, before)
                    continue
                products = multiplied(shape, weights, pairs, zeros)
                after = [ptx.fma(product, scales[i // 2], before[i]) for i, product in enumerate(products)]
                if shape.offset:
                    after = [ptx.fma(totals[split][block][i], offsets[i // 2], after[i]) for i in range(4)]
                sums[start : start + 4] = after
    return [*sums, *x_sums]


def multiplied(shape: WeightOnlyShape, weights: list[Value], pairs: list[Value], sums: Sums) -> Sums:
    """sums + weights . pairs of one chunk; of weights the pairs of row r, then those of row r + 8."""
    for step in range(_STEPS):
        a = [weights[PAIRS * half + 2 * step + i] for i in range(2) for half in range(2)]
        sums = ptx.multiply_add_tiles(shape.number.name, a, pairs[2 * step : 2 * step + 2], sums)
    return sums


def group_of(shape: WeightOnlyShape, chunk: Value, split: int) -> Value:
    """The group of a split of a chunk; the last one beyond K, where the tokens are zeros."""
    if shape.splits > 1:
        return ptx.smaller(ptx.plus(ptx.times(chunk, shape.splits), split), shape.groups - 1)
    return ptx.divided(chunk, shape.group_size // CHUNK)


def _load_tokens(shape: WeightOnlyShape, x: Pointer, block: int, chunk, row, quad) -> list[Value]:
    """Pairs of elements e and e + 16 of this lane's word of a token; beyond m those of the last token."""
    token = ptx.smaller(ptx.plus(row, _BLOCK * block), shape.m - 1)
    start = ptx.plus(ptx.times(chunk, CHUNK), ptx.times(quad, _WORD_ELEMENTS))
    where = ptx.advance_far(ptx.advance_far(x, token, 2 * shape.k), start, 2)
    words = [word for i in range(4) for word in ptx.load(ptx.advance(where, 16 * i), 4)]
    halves = zip(words[: PAIRS // 2], words[PAIRS // 2 :], strict=True)
    return [ptx.pick_bytes(low, high, selector) for low, high in halves for selector in (0x5410, 0x7632)]


def _of_split(shape: WeightOnlyShape, split: int, pairs: list[Value], quad) -> list[Value]:
    """The pairs where the lane's word is in the split, else zeros."""
    if shape.splits == 1:
        return pairs
    words = shape.group_size // _WORD_ELEMENTS
    mine = ptx.equal(ptx.shift_right(quad, words.bit_length() - 1), split)
    return [ptx.choose(mine, pair, ptx.int32(0)) for pair in pairs]


def _load_weights(shape: WeightOnlyShape, planes, tile: int, piece, row, quad) -> list[Value]:
    """Pairs of rows r and r + 8 of a tile of 16; a row's pieces of 16 bytes are exchanged by the swizzle."""
    within = ptx.plus(ptx.shift_left(ptx.flip_bits(piece, row), 4), ptx.shift_left(quad, 2))
    first = ptx.advance_far(ptx.advance_far(ptx.pointer(planes, SHARED), row, BYTES_PER_ROW), within, 1)
    weights = []
    for half in range(2):
        rows = [shape.tiling.rows * plane + TILE_ROWS * tile + 8 * half for plane in range(shape.w_format.bits)]
        words = [word for i in rows for word in ptx.load(ptx.advance(first, BYTES_PER_ROW * i), 1)]
        weights += unpack(words, shape.w_format, shape.number)
    return weights


def _row_terms(shape: WeightOnlyShape, terms, first_row, tile: int, row, group: Value | None) -> list[Value]:
    """A group's term of rows r and r + 8; beyond n those of the last row."""
    numbers = []
    for half in range(2):
        index = ptx.plus(ptx.plus(first_row, row), TILE_ROWS * tile + 8 * half)
        index = ptx.times(ptx.smaller(index, shape.n - 1), shape.groups)
        where = ptx.advance_far(ptx.pointer(terms, GLOBAL), index if group is None else ptx.plus(index, group), 4)
        numbers.append(ptx.as_float(ptx.load(where, 1)[0]))
    return numbers


def row_terms(shape: WeightOnlyShape, scale, offset, first_row: Value) -> list[Value]:
    """Of weights with one scale a row, those of rows r and r + 8 of every tile of 16; then offsets, if there are."""
    _, row, _ = place()
    terms = [scale, offset] if shape.offset else [scale]
    return [
        number
        for term in terms
        for tile in range(shape.row_tiles)
        for number in _row_terms(shape, term, first_row, tile, row, None)
    ]


def scaled(shape: WeightOnlyShape, sums: Sums, x_sums: Sums, terms: list[Value]) -> Sums:
    """The sums of weights with one scale a row, scaled, with offsets; `terms` are those of `row_terms`."""
    per_tile, scales = len(sums) // shape.row_tiles, 2 * shape.row_tiles
    after = []
    for i, number in enumerate(sums):
        tile, within = divmod(i, per_tile)
        row = 2 * tile + within % 4 // 2
        number = ptx.multiply(number, terms[row])
        after.append(ptx.fma(x_sums[within], terms[scales + row], number) if shape.offset else number)
    return after


def prefetch_groups(shape: WeightOnlyShape, scale, offset, part: Value, first_row: Value) -> None:
    """Has the L2 cache load the groups' terms of a part of K, of which every warp asks for some rows."""
    warp, row, quad = place()
    groups = max(1, PART // shape.group_size)
    first = ptx.divided(ptx.times(part, PART), shape.group_size)
    group = ptx.smaller(ptx.plus(first, ptx.times(quad, -(-groups // 4))), shape.groups - 1)
    for start in range(0, shape.tiling.rows, 8 * WARPS):
        index = ptx.plus(ptx.plus(first_row, row), ptx.plus(ptx.times(warp, 8), start))
        index = ptx.plus(ptx.times(ptx.smaller(index, shape.n - 1), shape.groups), group)
        for terms in [scale, offset] if shape.offset else [scale]:
            ptx.prefetch(ptx.advance_far(ptx.pointer(terms, GLOBAL), index, 4))


def finish(shape: WeightOnlyShape, sums, bias, out, first_row: Value) -> None:
    """Adds up the sums of all warps, and the bias, and writes a tile.

    Args:
      shape: of the product.
      sums: in shared memory, [warpgroups, sums_rows, width].
      bias: [n] in memory, or None.
      out: [m, tiles * rows] in memory.
      first_row: of the tile.
    """
    thread = ptx.opaque(ptx.thread_in_warpgroup())
    width_bits = shape.width.bit_length() - 1
    for start in range(0, shape.tiling.rows * shape.width, WARPGROUP):
        index = ptx.plus(thread, start)
        row, token = ptx.shift_right(index, width_bits), ptx.bits_of(index, shape.width - 1)
        # Row r of the instruction's 16 rows b is row 64 b + 16 warp + r of a warpgroup's sums.
        stored = ptx.plus(ptx.times(ptx.shift_right(row, 4), TILE_ROWS * WARPS), ptx.bits_of(row, TILE_ROWS - 1))
        where = ptx.advance_far(ptx.pointer(sums, SHARED), ptx.plus(ptx.times(stored, shape.width), token), 4)
        total = ptx.float32(0)
        for warpgroup in range(shape.tiling.warpgroups):
            for warp in range(WARPS):
                offset = 4 * shape.width * (warpgroup * shape.sums_rows + warp * TILE_ROWS)
                total = ptx.add(total, ptx.as_float(ptx.load(ptx.advance(where, offset), 1)[0]))
        column = ptx.plus(first_row, row)
        if bias is not None:
            at = ptx.advance_far(ptx.pointer(bias, GLOBAL), ptx.smaller(column, shape.n - 1), 4)
            total = ptx.add(total, ptx.as_float(ptx.load(at, 1)[0]))
        with ptx.when(ptx.less(token, shape.m)):
            target = ptx.advance_far(ptx.pointer(out, GLOBAL), token, 2 * shape.tiles * shape.tiling.rows)
            ptx.store_half(ptx.advance_far(target, column, 2), ptx.rounded(shape.number.name, total))

"""What the threads of a warpgroup do in the weight-only product: unpack, multiply, scale, finish.

Warps divide K: each takes chunks of 128 elements, of which a lane has one word of every row of weights, and multiplies
them with all tokens, so that a load of the tokens serves all rows of a tile. Which elements meet in an instruction is
free, as long as both operands agree: a lane's 32 elements of a row are 16 pairs of elements e and e + 16, two of them
in each of eight instructions.

Functions of values use `core.ptx` alone, so that tests run them for all threads in numpy.
"""

from __future__ import annotations

import functools

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.hardware import WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import GLOBAL, SHARED, Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, K_SLICE
from bipolar_jax.kernels.sm90.weight_only.config import CHUNK, TILE_ROWS, WeightOnlyShape
from bipolar_jax.kernels.sm90.weight_only.unpack import PAIRS, unpack

_STEPS = PAIRS // 2  # instructions of a chunk
_CHUNKS = K_SLICE // CHUNK
_BLOCK = 8  # tokens of an instruction
_WORD_ELEMENTS = 32

# Sums of rows r and r + 8 and columns 2 q and 2 q + 1, for every block of tokens, for every 16 rows of the tile.
Sums = list[Value]


def thread_coordinates() -> tuple[Value, Value, Value]:
    """This thread's warp, and its row r (lane // 4) and quad index q (lane % 4) in an instruction."""
    thread = ptx.opaque(ptx.thread_in_warpgroup())
    lane = ptx.bits_of(thread, WARP - 1)
    return ptx.shift_right(thread, 5), ptx.shift_right(lane, 2), ptx.bits_of(lane, 3)


def add_slice(
    shape: WeightOnlyShape, sums: Sums, x_sums: Sums, planes, x, scale, offset, k_slice: Value, first_row: Value
) -> tuple[Sums, Sums]:
    """Adds a slice of K, all planes of which are in shared memory.

    Args:
      shape: of the product.
      sums: of values times activations; with groups these are scaled, offsets included.
      x_sums: of the activations, if there are offsets and no groups; else empty.
      planes: [planes, rows, 32 words] in shared memory, swizzled.
      x: [m, k] in global memory.
      scale, offset: [n, groups] in global memory; offset may be None.
      k_slice: index of the slice.
      first_row: of the tile.
    """
    warp, row, quad = thread_coordinates()
    values, count = [*sums, *x_sums], len(sums)
    for turn in range(_CHUNKS // WARPS):
        in_slice = ptx.plus(warp, turn * WARPS)
        chunk = ptx.plus(ptx.times(k_slice, _CHUNKS), in_slice)
        add = functools.partial(
            _add_chunk, shape, values, count, planes, x, scale, offset, in_slice, chunk, first_row, row, quad
        )
        values = ptx.update_if(ptx.less(chunk, shape.k // CHUNK), values, add)
    return values[:count], values[count:]


def _add_chunk(shape, values, count, planes, x, scale, offset, in_slice, chunk, first_row, row, quad) -> list[Value]:
    """`add_slice` for one chunk of this warp, the in_slice-th of the slice; `values` are sums, then x_sums."""
    sums, x_sums = list(values[:count]), list(values[count:])
    num_blocks = shape.width // _BLOCK
    tokens = [_load_tokens(shape, ptx.pointer(x, GLOBAL), i, chunk, row, quad) for i in range(num_blocks)]
    grouped = shape.group_size is not None
    ones = [ptx.int32(shape.float_type.one_bits * 0x10001)] * (2 * PAIRS)
    zeros = [ptx.float32(0)] * 4
    # The tokens once for every group of the chunk, zero outside the group.
    group_tokens = [[_of_group(shape, i, pairs, quad) for pairs in tokens] for i in range(shape.groups_per_chunk)]
    if shape.offset:  # sums of the tokens, by the same instruction
        totals = [[multiplied(shape, ones, pairs, zeros) for pairs in blocks] for blocks in group_tokens]
    if shape.offset and not grouped:
        x_sums = [ptx.add(a, b) for a, b in zip(x_sums, [n for four in totals[0] for n in four], strict=True)]
    for tile in range(shape.row_tiles):
        weights = _load_weights(shape, planes, tile, in_slice, row, quad)
        for i, blocks in enumerate(group_tokens):
            if grouped:
                group = group_of(shape, chunk, i)
                scales = _row_terms(shape, scale, first_row, tile, row, group)
                offsets = _row_terms(shape, offset, first_row, tile, row, group) if shape.offset else None
            for block, pairs in enumerate(blocks):
                start = 4 * (tile * num_blocks + block)
                before = sums[start : start + 4]
                if not grouped:
                    sums[start : start + 4] = multiplied(shape, weights, pairs, before)
                    continue
                products = multiplied(shape, weights, pairs, zeros)
                after = [ptx.fma(product, scales[j // 2], before[j]) for j, product in enumerate(products)]
                if shape.offset:
                    after = [ptx.fma(totals[i][block][j], offsets[j // 2], after[j]) for j in range(4)]
                sums[start : start + 4] = after
    return [*sums, *x_sums]


def multiplied(shape: WeightOnlyShape, weights: list[Value], pairs: list[Value], sums: Sums) -> Sums:
    """sums + weights . pairs over one chunk; weights are the pairs of row r, then those of row r + 8."""
    for step in range(_STEPS):
        a = [weights[PAIRS * half + 2 * step + i] for i in range(2) for half in range(2)]
        sums = ptx.multiply_add_tiles(shape.float_type.name, a, pairs[2 * step : 2 * step + 2], sums)
    return sums


def group_of(shape: WeightOnlyShape, chunk: Value, i: int) -> Value:
    """The i-th group of a chunk; beyond K the last group, where the tokens are zeros."""
    if shape.groups_per_chunk > 1:
        return ptx.smaller(ptx.plus(ptx.times(chunk, shape.groups_per_chunk), i), shape.groups - 1)
    return ptx.divided(chunk, shape.group_size // CHUNK)


def _load_tokens(shape: WeightOnlyShape, x: Pointer, block: int, chunk, row, quad) -> list[Value]:
    """Pairs of elements e and e + 16 of this lane's 32 elements of a token; beyond m of the last token."""
    token = ptx.smaller(ptx.plus(row, _BLOCK * block), shape.m - 1)
    start = ptx.plus(ptx.times(chunk, CHUNK), ptx.times(quad, _WORD_ELEMENTS))
    source = ptx.advance_far(ptx.advance_far(x, token, 2 * shape.k), start, 2)
    words = [word for i in range(4) for word in ptx.load(ptx.advance(source, 16 * i), 4)]
    halves = zip(words[: PAIRS // 2], words[PAIRS // 2 :], strict=True)
    return [ptx.pick_bytes(low, high, selector) for low, high in halves for selector in (0x5410, 0x7632)]


def _of_group(shape: WeightOnlyShape, i: int, pairs: list[Value], quad) -> list[Value]:
    """The pairs if the lane's elements are in the i-th group of the chunk, else zeros."""
    if shape.groups_per_chunk == 1:
        return pairs
    words = shape.group_size // _WORD_ELEMENTS
    mine = ptx.equal(ptx.shift_right(quad, words.bit_length() - 1), i)
    return [ptx.choose(mine, pair, ptx.int32(0)) for pair in pairs]


def _load_weights(shape: WeightOnlyShape, planes, tile: int, in_slice, row, quad) -> list[Value]:
    """Pairs of rows r and r + 8 of the tile-th 16 rows, of one chunk."""
    # A chunk is 16 bytes of a row; the swizzle has them at index in_slice ^ (row % 8).
    offset = ptx.plus(ptx.shift_left(ptx.flip_bits(in_slice, row), 4), ptx.shift_left(quad, 2))
    first = ptx.advance_far(ptx.advance_far(ptx.pointer(planes, SHARED), row, BYTES_PER_ROW), offset, 1)
    weights = []
    for half in range(2):
        rows = [shape.tiling.rows * plane + TILE_ROWS * tile + 8 * half for plane in range(shape.w_format.bits)]
        words = [word for i in rows for word in ptx.load(ptx.advance(first, BYTES_PER_ROW * i), 1)]
        weights += unpack(words, shape.w_format, shape.float_type)
    return weights


def _row_terms(shape: WeightOnlyShape, terms, first_row, tile: int, row, group: Value | None) -> list[Value]:
    """A group's terms of rows r and r + 8; beyond n of the last row."""
    numbers = []
    for half in range(2):
        index = ptx.plus(ptx.plus(first_row, row), TILE_ROWS * tile + 8 * half)
        index = ptx.times(ptx.smaller(index, shape.n - 1), shape.groups)
        source = ptx.advance_far(ptx.pointer(terms, GLOBAL), index if group is None else ptx.plus(index, group), 4)
        numbers.append(ptx.as_float(ptx.load(source, 1)[0]))
    return numbers


def row_terms(shape: WeightOnlyShape, scale, offset, first_row: Value) -> list[Value]:
    """Scales of rows r and r + 8 of every 16 rows, then their offsets if there are any; without groups."""
    _, row, _ = thread_coordinates()
    terms = [scale, offset] if shape.offset else [scale]
    return [
        number
        for term in terms
        for tile in range(shape.row_tiles)
        for number in _row_terms(shape, term, first_row, tile, row, None)
    ]


def scaled(shape: WeightOnlyShape, sums: Sums, x_sums: Sums, terms: list[Value]) -> Sums:
    """Scaled sums, offsets included, without groups; `terms` are the result of `row_terms`."""
    per_tile, scales = len(sums) // shape.row_tiles, 2 * shape.row_tiles
    after = []
    for i, number in enumerate(sums):
        tile, within = divmod(i, per_tile)
        row = 2 * tile + within % 4 // 2
        number = ptx.multiply(number, terms[row])
        after.append(ptx.fma(x_sums[within], terms[scales + row], number) if shape.offset else number)
    return after


def prefetch_groups(shape: WeightOnlyShape, scale, offset, k_slice: Value, first_row: Value) -> None:
    """Prefetches the groups' terms of a slice of K into the L2 cache; the warps divide the rows."""
    warp, row, quad = thread_coordinates()
    groups = max(1, K_SLICE // shape.group_size)
    first = ptx.divided(ptx.times(k_slice, K_SLICE), shape.group_size)
    group = ptx.smaller(ptx.plus(first, ptx.times(quad, -(-groups // 4))), shape.groups - 1)
    for start in range(0, shape.tiling.rows, 8 * WARPS):
        index = ptx.plus(ptx.plus(first_row, row), ptx.plus(ptx.times(warp, 8), start))
        index = ptx.plus(ptx.times(ptx.smaller(index, shape.n - 1), shape.groups), group)
        for terms in [scale, offset] if shape.offset else [scale]:
            ptx.prefetch(ptx.advance_far(ptx.pointer(terms, GLOBAL), index, 4))


def finish(shape: WeightOnlyShape, sums, bias, out, first_row: Value) -> None:
    """Adds up the sums of all warps and the bias, and stores a tile.

    Args:
      shape: of the product.
      sums: [warpgroups, sums_rows, width] in shared memory.
      bias: [n] in global memory, or None.
      out: [m, tiles * rows] in global memory.
      first_row: of the tile.
    """
    thread = ptx.opaque(ptx.thread_in_warpgroup())
    width_bits = shape.width.bit_length() - 1
    for start in range(0, shape.tiling.rows * shape.width, WARPGROUP):
        index = ptx.plus(thread, start)
        row, token = ptx.shift_right(index, width_bits), ptx.bits_of(index, shape.width - 1)
        # Row 16 b + r of the tile is row 64 b + 16 warp + r of a warpgroup's sums.
        sums_row = ptx.plus(ptx.times(ptx.shift_right(row, 4), TILE_ROWS * WARPS), ptx.bits_of(row, TILE_ROWS - 1))
        source = ptx.advance_far(ptx.pointer(sums, SHARED), ptx.plus(ptx.times(sums_row, shape.width), token), 4)
        total = ptx.float32(0)
        for warpgroup in range(shape.tiling.warpgroups):
            for warp in range(WARPS):
                offset = 4 * shape.width * (warpgroup * shape.sums_rows + warp * TILE_ROWS)
                total = ptx.add(total, ptx.as_float(ptx.load(ptx.advance(source, offset), 1)[0]))
        column = ptx.plus(first_row, row)
        if bias is not None:
            at = ptx.advance_far(ptx.pointer(bias, GLOBAL), ptx.smaller(column, shape.n - 1), 4)
            total = ptx.add(total, ptx.as_float(ptx.load(at, 1)[0]))
        with ptx.when(ptx.less(token, shape.m)):
            target = ptx.advance_far(ptx.pointer(out, GLOBAL), token, 2 * shape.tiles * shape.tiling.rows)
            ptx.store_half(ptx.advance_far(target, column, 2), ptx.rounded(shape.float_type.name, total))

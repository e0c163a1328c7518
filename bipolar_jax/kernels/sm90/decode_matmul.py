"""Matrix product of few tokens with packed weights, as fast as the weights can be read.

Weights are the rows of the accumulator: a tile is 64 columns of the output, and for every
plane of weights the tensor cores multiply it with all planes of all tokens at once, so that
activations of 8 bits cost no more than those of one. Persistent blocks; each of a block's warpgroups
has its own parts of K, which it loads for itself into a ring that runs ahead across tiles. Integer
sums meet in shared memory, and one warpgroup finishes the tile while the others go on.

With t_i the products of weight plane i, of weight p_i, with the bits of the activations,

    P[n, token] = sum_j q_j sum_i p_i t_i[n, (j, token)]

where the inner sum is by Horner's rule in the tensor cores' accumulator, and the outer one adds
its column blocks. `recovery` has what completes P.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from bipolar_jax.kernels.sm90 import tensor_core
from bipolar_jax.kernels.sm90.epilogue import ColumnTerms, TokenTerms, finish_transposed
from bipolar_jax.kernels.sm90.operand_words import fill_up
from bipolar_jax.kernels.sm90.recovery import Recovery
from bipolar_jax.kernels.sm90.tensor_core import BYTES_PER_ROW, ROWS_PER_INSTRUCTION, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.tiling import MULTIPROCESSORS, SHARED_MEMORY_BYTES

TOKENS_PER_BLOCK = 8  # of columns of one plane: what the tensor cores take at least
MOST_COLUMNS = 256  # of an instruction
_PART = 8 * BYTES_PER_ROW  # elements of K that are loaded and multiplied at a time
_TMA_ALIGNMENT = 16  # bytes, of the stride of rows in memory
_LEAST_COPY = 32  # numbers of 4 bytes: Mosaic copies 128 bytes at least
_MOST_WARPGROUPS, _LEAST_SLOTS, _MOST_SLOTS = 4, 3, 8
_TERMS_BYTES = 4 * 1024


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """How a block shares out K.

    Attributes:
      warpgroups: 1 to 4, which take 1024 elements of K in turn.
      w_slots: tiles of one plane, 64 x 1024 bits, that each has in shared memory at a time.
      x_slots: tiles of all planes of all tokens, likewise.
    """

    warpgroups: int
    w_slots: int
    x_slots: int


def token_columns(m: int) -> int:
    """Columns of the accumulator for m tokens of one plane."""
    return -(-m // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def x_planes(m: int, a_bits: int) -> int:
    """Planes of the tokens' tiles: those of the activations, and one of whatever where no instruction is so wide."""
    return a_bits if tensor_core.is_legal_width(a_bits * token_columns(m)) else a_bits + 1


def decode_tiling(m: int, k: int, a_bits: int) -> DecodeTiling:
    """As many warpgroups as have enough registers and work, and as deep rings as fit.

    Raises:
      NotImplementedError: more columns than an instruction has.
    """
    columns = x_planes(m, a_bits) * token_columns(m)
    if columns > MOST_COLUMNS:
        raise NotImplementedError(f"{m} tokens of {a_bits} planes are {columns} columns, more than {MOST_COLUMNS}")
    # 512 threads have 128 registers each: too few for the widest accumulator.
    most = _MOST_WARPGROUPS if columns <= MOST_COLUMNS // 2 else 2
    for warpgroups, x_slots in itertools.product(range(min(most, -(-k // _PART)), 0, -1), (2, 1)):
        handed_over = 4 * ROWS_PER_INSTRUCTION * token_columns(m) * warpgroups  # and the output
        left = (SHARED_MEMORY_BYTES - _TERMS_BYTES - handed_over) // (warpgroups * BYTES_PER_ROW)  # rows of tiles
        w_slots = min(_MOST_SLOTS, (left - x_slots * columns) // ROWS_PER_INSTRUCTION)
        if w_slots >= _LEAST_SLOTS:
            return DecodeTiling(warpgroups, w_slots, x_slots)
    raise AssertionError(f"{columns} columns leave no shared memory")


def decode_matmul(
    x_words: UInt32[Array, "x_planes m x_words"],
    w_words: UInt32[Array, "w_planes n w_words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    dtype: jnp.dtype,
    *,
    tiling: DecodeTiling | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """x . w^T of packed planes.

    Args:
      x_words: bit planes of the tokens, zero where k is not below the true K; a multiple of 4 words.
      w_words: likewise, of the weights.
      tokens: terms of rows of x, [m] or more; scale None makes the output the int32 product.
      columns: terms of rows of w.
      recovery: how planes make products; kind "planes".
      dtype: of the output: float32, bfloat16, float16, or int32.
      tiling: how a block shares out K; None chooses.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in `dtype`.

    Raises:
      ValueError: words that TMA cannot address.
      NotImplementedError: more tokens and planes than an instruction has columns.
    """
    (_, m, x_width), (_, n, w_width) = x_words.shape, w_words.shape
    if x_width % 4 or w_width % 4:
        raise ValueError(f"rows must be multiples of 4 words, got {x_width} words of x and {w_width} of w")
    tiling = decode_tiling(m, recovery.k, recovery.a_format.bits) if tiling is None else tiling
    tiles = -(-n // ROWS_PER_INSTRUCTION)
    tokens, columns = jax.tree.map(lambda term: fill_up(term, _TMA_ALIGNMENT // 4), (tokens, columns))
    flat, tree = jax.tree.flatten((tokens, columns))
    columns_unit = _TMA_ALIGNMENT // jnp.dtype(dtype).itemsize
    out = plgpu.kernel(
        functools.partial(_kernel, m, tiles, recovery, tiling, dtype, tree, interpret is not None),
        out_type=jax.ShapeDtypeStruct((m, -(-n // columns_unit) * columns_unit), dtype),
        grid=(min(tiles, blocks),),
        grid_names=("block",),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        scratch_types=_scratch(m, recovery, tiling, dtype, tokens, columns),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x_words, w_words, *flat)
    return out[:, :n]


def _scratch(m, recovery: Recovery, tiling: DecodeTiling, dtype, tokens: TokenTerms, columns: ColumnTerms) -> dict:
    width, others = token_columns(m), max(1, tiling.warpgroups - 1)
    tile = functools.partial(plgpu.SMEM, dtype=jnp.uint32, transforms=tensor_core.TILE_TRANSFORMS)
    return dict(
        w_ring=tile((tiling.warpgroups, tiling.w_slots, ROWS_PER_INSTRUCTION, WORDS_PER_ROW)),
        x_ring=tile((tiling.warpgroups, tiling.x_slots, x_planes(m, recovery.a_format.bits), width, WORDS_PER_ROW)),
        w_arrived=plgpu.Barrier(num_barriers=tiling.warpgroups * tiling.w_slots),
        x_arrived=plgpu.Barrier(num_barriers=tiling.warpgroups * tiling.x_slots),
        handed_over=plgpu.SMEM((others, ROWS_PER_INSTRUCTION, width), jnp.int32),
        all_handed_over=plgpu.Barrier(num_arrivals=others),
        taken=plgpu.Barrier(),
        tokens=jax.tree.map(lambda term: plgpu.SMEM((-(-width // _LEAST_COPY) * _LEAST_COPY,), term.dtype), tokens),
        tokens_arrived=plgpu.Barrier(num_arrivals=len(jax.tree.leaves(tokens))),
        columns=jax.tree.map(lambda term: plgpu.SMEM((ROWS_PER_INSTRUCTION,), term.dtype), columns),
        columns_arrived=plgpu.Barrier(num_arrivals=len(jax.tree.leaves(columns))),
        staging=plgpu.SMEM((width, ROWS_PER_INSTRUCTION), dtype),
    )


def _kernel(
    m,
    tiles,
    recovery,
    tiling,
    dtype,
    tree,
    emulate,
    x,
    w,
    *refs,
    w_ring,
    x_ring,
    w_arrived,
    x_arrived,
    tokens,
    tokens_arrived,
    columns,
    columns_arrived,
    **shared,
):
    *flat, out = refs
    token_source, column_source = jax.tree.unflatten(tree, flat)
    me, block, blocks = lax.axis_index("warpgroup"), lax.axis_index("block"), lax.axis_size("block")
    width = token_columns(m)
    my_tiles = lax.div(tiles - block + blocks - 1, blocks)
    # Parts of K that each warpgroup takes; the last ones may be beyond K, and come as zeros.
    turns = -(-recovery.k // (_PART * tiling.warpgroups))
    planes = sorted(range(recovery.w_format.bits), key=lambda plane: -recovery.w_format.plane_weights[plane])
    # The start of the tokens is no constant, or Pallas would refuse a tile that goes beyond them.
    no_token = 0 * me

    def first_column(tile):
        return (block + tile * blocks) * ROWS_PER_INSTRUCTION

    def words(position):
        """The words of K at a position, counted in parts over tiles."""
        return pl.ds((me + lax.rem(position, turns) * tiling.warpgroups) * WORDS_PER_ROW, WORDS_PER_ROW)

    def load_w(position, number):
        """Loads the number-th plane at a position, or after it, into the ring."""
        position, number = position + number // len(planes), number % len(planes)
        slot = lax.rem(position * len(planes) + number, tiling.w_slots)

        @pl.when(position < my_tiles * turns)
        def _():
            # [64, 32 words]
            plgpu.copy_gmem_to_smem(
                w.at[
                    planes[number],
                    pl.ds(first_column(lax.div(position, turns)), ROWS_PER_INSTRUCTION),
                    words(position),
                ],
                w_ring.at[me, slot],
                w_arrived.at[me * tiling.w_slots + slot],
            )

    def load_x(position):
        slot = lax.rem(position, tiling.x_slots)

        @pl.when(position < my_tiles * turns)
        def _():
            # [x_planes, width, 32 words]
            plgpu.copy_gmem_to_smem(
                x.at[:, pl.ds(no_token, width), words(position)],
                x_ring.at[me, slot, pl.ds(0, recovery.a_format.bits)],
                x_arrived.at[me * tiling.x_slots + slot],
            )

    start = 0 * me
    for number in range(tiling.w_slots):
        load_w(start, number)
    for position in range(tiling.x_slots):
        load_x(start + position)

    @pl.when(me == 0)
    def _():
        _load_terms(token_source, tokens, no_token, tokens_arrived)

    def tile(index, carry):
        @pl.when(me == 0)
        def _():
            _load_terms(column_source, columns, first_column(index), columns_arrived)

        def add_part(turn, total):
            position = index * turns + turn
            x_slot = lax.rem(position, tiling.x_slots)
            plgpu.barrier_wait(x_arrived.at[me * tiling.x_slots + x_slot])

            def operands(number):
                slot = lax.rem(position * len(planes) + number, tiling.w_slots)
                plgpu.barrier_wait(w_arrived.at[me * tiling.w_slots + slot])
                return w_ring.at[me, slot], x_ring.at[me, x_slot]

            product = _product(
                recovery, planes, width, operands, lambda number: load_w(position, number + tiling.w_slots), emulate
            )
            load_x(position + tiling.x_slots)
            return total + product

        total = lax.fori_loop(0, turns, add_part, tensor_core.zeros(ROWS_PER_INSTRUCTION, width))

        @pl.when(me > 0)
        def _():
            @pl.when(index > 0)
            def _():
                plgpu.barrier_wait(shared["taken"])

            shared["handed_over"][me - 1] = total
            plgpu.barrier_arrive(shared["all_handed_over"])

        @pl.when(me == 0)
        def _():
            @pl.when(index == 0)
            def _():
                plgpu.barrier_wait(tokens_arrived)

            terms = (jax.tree.map(lambda ref: ref.at[pl.ds(0, width)], tokens), columns)
            target = out.at[pl.ds(no_token, width), pl.ds(first_column(index), ROWS_PER_INSTRUCTION)]
            _finish(total, recovery, tiling, dtype, terms, columns_arrived, target, index + 1 == my_tiles, **shared)

        return carry

    lax.fori_loop(0, my_tiles, tile, ())

    @pl.when(me == 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load_terms(sources, targets, start, barrier):
    for source, target in zip(jax.tree.leaves(sources), jax.tree.leaves(targets), strict=True):
        plgpu.copy_gmem_to_smem(source.at[pl.ds(start, target.shape[0])], target, barrier)


def _product(recovery: Recovery, planes: list[int], width: int, operands, refill, emulate: bool):
    """sum_ij p_i q_j popc over one part of K, int32 [64, width].

    Args:
      recovery: the planes' weights.
      planes: of the weights, the heaviest first.
      width: columns of one plane of the tokens.
      operands: waits for the number-th of them; gives refs [64, 32 words] and [x_planes, width, 32 words].
      refill: loads what follows into the slot of the number-th.
      emulate: whether this is interpret mode.
    """
    weights = [recovery.w_format.plane_weights[plane] for plane in planes]
    acc = None
    for number, weight in enumerate(weights):
        if acc is None:
            w_tile, x_tile = operands(number)
            shape = (ROWS_PER_INSTRUCTION, x_tile.shape[0] * width)
            acc = tensor_core.start(shape, w_tile, x_tile, "planes", emulate=emulate)
        else:
            acc = tensor_core.begin(acc * (weights[number - 1] // weight), emulate=emulate)
            acc = tensor_core.accumulate(acc, *operands(number), "planes", emulate=emulate)
        acc = tensor_core.settle(acc, emulate=emulate)
        refill(number)
    parts = [lax.slice(acc, (0, j * width), (acc.shape[0], (j + 1) * width)) for j in range(recovery.a_format.bits)]
    return functools.reduce(
        jnp.add, (part * weight for part, weight in zip(parts, recovery.a_format.plane_weights, strict=True))
    )


def _finish(
    total, recovery, tiling, dtype, terms, columns_arrived, out, last, *, handed_over, all_handed_over, taken, staging
):
    """Adds what the other warpgroups summed, completes and stores the columns of a tile.

    Args:
      total: this warpgroup's sum, int32 [64, width].
      recovery, tiling, dtype: as in `decode_matmul`.
      terms: of tokens and columns, in shared memory.
      columns_arrived: barrier of the latter.
      out: [width, 64] in memory.
      last: whether no tile follows.
      handed_over, all_handed_over, taken: where the others' sums are, and barriers for both ways.
      staging: [width, 64] in shared memory.
    """
    if tiling.warpgroups > 1:
        plgpu.barrier_wait(all_handed_over)
        for other in range(tiling.warpgroups - 1):
            total = total + plgpu.load(handed_over.at[other], layout=tensor_core.ACCUMULATOR, optimized=False)
        plgpu.barrier_arrive(taken, predicate=jnp.logical_not(last))
    plgpu.barrier_wait(columns_arrived)
    finished = finish_transposed(plgpu.layout_cast(total, plgpu.Layout.WGMMA), recovery, *terms)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    # Registers of one number each, as rows of the output are columns here.
    staging_rows = staging.transpose((1, 0))
    staging_rows[...] = plgpu.layout_cast(finished, tensor_core.ACCUMULATOR).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)

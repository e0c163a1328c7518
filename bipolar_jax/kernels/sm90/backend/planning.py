"""The choice of kernel and tiling for a product: from the device's table of measured problems, else by an estimate."""

from __future__ import annotations

import contextlib
import dataclasses
import math

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.sm90.backend import cost
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ELEMENTS_PER_ROW, ROWS_PER_INSTRUCTION, OperandKind
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS, Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import (
    DecodeTiling,
    accumulator_columns,
    decode_tilings,
    parted_tiling,
)
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.tuning.table import nearest_entry

# Pairs of planes up to which products run on the binary tensor cores: they are 8 times as fast as the int8 ones, and
# weights need no expansion.
MOST_BINARY_PAIRS = 8

# The kind of the table's entries for `decode_matmul`; their m is the columns of the instruction, their steps count the
# planes of the weights alone.
FEW_TOKENS = "few tokens"

# An H100 or H200, for estimates.
_MEMORY_BYTES_PER_CYCLE = 2300  # 4.1 TB/s at 1.755 GHz
_L2_BYTES_PER_CYCLE = 32  # of each multiprocessor, when all load
_LAUNCH_CYCLES = 3500  # 2 us, for an additional kernel
_SETTLING = 1.4  # in the product of few tokens: for waits between planes; fits n = 22016

# Of modelled times: what 19 of 20 are off by at most.
_ERROR = 0.1

# Columns of a tile whose heads are rotated: wider accumulators would spill.
MOST_HEAD_COLUMNS = 128

# Of 36 problems in tiles of 128 x 128, 5 slots took at most 1.06 times as long as the best of 4, 5 and 6; 4 slots took
# 1.15 times as long where weights exceed the L2 cache, and 6, which leave less room for outputs, 1.16 where K is short
# (`tune_matmul.json` of an H200). Of 23 problems clusters of two blocks save up to 18% where few tokens, or a short K,
# make loads bind (`bench_coverage_plans.json`).
CANDIDATES = (
    Tiling(128, 192, "alternate", slots=4, band=16, band_axis="m"),
    Tiling(128, 128, "alternate", slots=5, band=8, band_axis="n"),
    Tiling(64, 192, "alternate", slots=5, band=8, band_axis="n"),
    Tiling(64, 128, "alternate", slots=6, band=8, band_axis="n"),
    Tiling(128, 64, "alternate", slots=6, band=8, band_axis="n"),
    Tiling(64, 64, "alternate", slots=8, band=8, band_axis="n"),
    Tiling(128, 128, "alternate", slots=5, cluster_n=2, band=8, band_axis="n"),
    Tiling(64, 128, "alternate", slots=6, cluster_n=2, band=8, band_axis="n"),
)

# With groups a consumer holds two accumulators and a float sum, so tiles are smaller.
GROUPED_CANDIDATES = (
    Tiling(64, 128, "split_m", slots=5, band=8, band_axis="n"),
    Tiling(128, 64, "split_n", slots=5, band=8, band_axis="n"),
    Tiling(64, 64, "split_m", slots=6, band=8, band_axis="n"),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel and tiling of a product.

    Attributes:
      kind: "planes" for the binary tensor cores, "int8" for bytes on the int8 ones.
      tiling: of `packed_matmul`, or of `decode_matmul` (a `DecodeTiling`).
      reason: where the tiling comes from.
    """

    kind: OperandKind
    tiling: Tiling | DecodeTiling
    reason: str


def plan_product(
    m: int,
    n: int,
    k: int,
    a_format: BipolarFormat,
    w_format: BipolarFormat,
    group_size: int | None = None,
    *,
    may_split: bool = False,
) -> Choice:
    """The plan of x [m, k] times w [k, n], with one scale for each column, or one for each group of `group_size`.

    Where `may_split`, the output is a matrix, for which blocks may multiply parts of K.
    """
    if m <= FEW_TOKENS_LIMIT:
        with contextlib.suppress(Unsupported):
            return _plan_few(m, n, k, a_format, w_format, group_size)
    if group_size is not None:
        steps = mainloop_steps(k, "int8", 1)
        tiling = min(GROUPED_CANDIDATES, key=lambda tiling: estimated_cycles(tiling, m, n, steps))
        return Choice("int8", tiling, "estimated from tile sizes")
    choice = _plan_many(m, n, k, a_format, w_format, may_split)
    if m <= FEW_TOKENS_LIMIT:
        tiling = parted_tiling(m, k, a_format.bits, w_format.bits)
        sizes = (m, n, k, a_format, w_format)
        if few_tokens_cycles(tiling, *sizes) < many_tokens_cycles(choice, *sizes):
            return Choice("planes", tiling, f"{m} tokens in {tiling.parts} parts: estimated from bytes and planes")
    return choice


def _plan_few(
    m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat, group_size: int | None
) -> Choice:
    """The plan of `decode_matmul`. Raises Unsupported as `decode_tilings` does."""
    tilings = decode_tilings(m, k, a_format.bits, w_format.bits, group_size)
    if interpret_params() is None and group_size is None:
        columns, steps = accumulator_columns(m, a_format.bits), mainloop_steps(k, "planes", w_format.bits)
        entry = nearest_entry(default_device().device_kind, FEW_TOKENS, columns, n, steps)
        for tiling in tilings if entry is not None else ():
            # The measured problem may have other ring depths: those that fit this product's tokens are taken.
            if all(getattr(tiling, name) == entry["tiling"][name] for name in ("warpgroups", "x_slots")):
                return Choice("planes", tiling, f"measured at {entry['shape']}")
    return Choice("planes", tilings[0], f"{m} tokens: bound by reading the weights")


def _plan_many(m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat, may_split: bool) -> Choice:
    """The plan of `packed_matmul` with one scale for each column.

    It is the tiling that was measured for the nearest problem, unless the model promises to save more than it is off.
    """
    pairs = a_format.bits * w_format.bits
    kind: OperandKind = "planes" if pairs <= MOST_BINARY_PAIRS else "int8"
    steps = mainloop_steps(k, kind, pairs)
    times = tiling_times(m, n, k, kind, pairs, may_split=may_split)
    best = cost.cheapest(times)
    if interpret_params() is None:
        entry = nearest_entry(default_device().device_kind, kind, m, n, steps)
        if entry is not None:
            measured = Tiling(**entry["tiling"])
            passes = pairs if kind == "planes" else 1
            time = cost.tiles_microseconds(measured, m, n, steps, passes, row_bytes(k, kind))
            if times[best] >= (1 - _ERROR) * time:
                return Choice(kind, measured, f"measured at {entry['shape']}")
    return Choice(kind, best, cost.reason(best))


def tiling_times(
    m: int,
    n: int,
    k: int,
    kind: OperandKind,
    pairs: int,
    *,
    may_split: bool = True,
    candidates: tuple[Tiling, ...] = CANDIDATES,
) -> dict[Tiling, float]:
    """Modelled microseconds of `packed_matmul`, by tiling; with splits of K if the output may be made of them."""
    steps, passes, stride = mainloop_steps(k, kind, pairs), pairs if kind == "planes" else 1, row_bytes(k, kind)
    tilings = cost.with_splits(candidates, m, n, steps, passes) if may_split else candidates
    return {tiling: cost.tiles_microseconds(tiling, m, n, steps, passes, stride) for tiling in tilings}


def few_tokens_cycles(
    tiling: DecodeTiling, m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat
) -> float:
    """Estimated cycles of `decode_matmul`: the longer of reading the weights from memory, and the busiest block.

    A block's step is one part of the tokens, one plane and 1024 elements of K. It takes the longer of the tensor cores'
    time, and of loading the plane's tile of weights and its share of the tokens from L2.
    """
    tokens = tiling.part_tokens(m)
    columns = accumulator_columns(tokens, a_format.bits)
    loaded = (ROWS_PER_INSTRUCTION + columns / w_format.bits) * BYTES_PER_ROW
    turn = max(2 * columns, loaded / _L2_BYTES_PER_CYCLE) * _SETTLING
    turns = math.ceil(math.ceil(n / ROWS_PER_INSTRUCTION) * tiling.parts / MULTIPROCESSORS)
    mainloop = turns * mainloop_steps(k, "planes", w_format.bits) * turn
    return max(mainloop, n * k * w_format.bits / 8 / _MEMORY_BYTES_PER_CYCLE)


def many_tokens_cycles(
    choice: Choice, m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat
) -> float:
    """Estimated cycles of `packed_matmul`; for bytes with the expansion of the weights, which are written and read."""
    pairs = a_format.bits * w_format.bits
    cycles = estimated_cycles(choice.tiling, m, n, mainloop_steps(k, choice.kind, pairs))
    if choice.kind == "planes":
        return max(cycles, n * k * w_format.bits / 8 / _MEMORY_BYTES_PER_CYCLE)
    expansion = n * k * (1 + w_format.bits / 8) / _MEMORY_BYTES_PER_CYCLE + _LAUNCH_CYCLES
    return expansion + max(cycles, n * k / _MEMORY_BYTES_PER_CYCLE)


def plan_heads(
    sequences: int, length: int, n: int, k: int, head_dim: int, a_format: BipolarFormat, w_format: BipolarFormat
) -> Choice:
    """The plan of a product whose tiles are whole heads, see `prompt_projection`; the measured one if its tiles are.

    Raises:
      Unsupported: few tokens: their kernel has weights as rows.
    """
    choice = plan_product(sequences * length, n, k, a_format, w_format)
    if isinstance(choice.tiling, DecodeTiling):
        raise Unsupported(f"{sequences * length} tokens are too few for tiles of them")
    if sequences == 1 and _holds_heads(choice.tiling, head_dim):
        return _with_staging_of_heads(choice)
    steps = mainloop_steps(k, choice.kind, a_format.bits * w_format.bits)
    able = [tiling for tiling in CANDIDATES if _holds_heads(tiling, head_dim)]
    tiling = min(able, key=lambda tiling: estimated_cycles(tiling, length, sequences * n, steps))
    choice = Choice(choice.kind, tiling, f"estimated from tile sizes, of those that hold heads of {head_dim}")
    return _with_staging_of_heads(choice)


def _holds_heads(tiling: Tiling, head_dim: int) -> bool:
    """Whether tiles are whole heads, and leave registers to rotate them; in clusters ptxas spills some."""
    return tiling.tile_n % head_dim == 0 and tiling.tile_n <= MOST_HEAD_COLUMNS and tiling.cluster_size == 1


def _with_staging_of_heads(choice: Choice) -> Choice:
    tiling = with_staging(choice.tiling)
    if tiling == choice.tiling:
        return choice
    return Choice(choice.kind, tiling, f"{choice.reason}, with {tiling.slots} slots to leave room for heads")


def with_staging(tiling: Tiling) -> Tiling:
    """The tiling with fewer operand slots, so that every store chunk of a tile has a staging slot.

    The cosines and sines of a tile arrive in the staging slots during the mainloop.
    """
    store_chunks = dataclasses.replace(tiling, slots=2).staging_slots()
    while tiling.slots > 2 and tiling.staging_slots() < store_chunks:
        tiling = dataclasses.replace(tiling, slots=tiling.slots - 1)
    return tiling


def mainloop_steps(k: int, kind: OperandKind, pairs: int) -> int:
    """Length of the mainloop in 128-byte rows of K, over all pairs of planes; tables are keyed by it."""
    return -(-k // ELEMENTS_PER_ROW[kind]) * (pairs if kind == "planes" else 1)


def row_bytes(k: int, kind: OperandKind) -> int:
    """From a row of an operand, of one plane or of bytes, to the next one: a multiple of 16."""
    return 16 * math.ceil(k * BYTES_PER_ROW / ELEMENTS_PER_ROW[kind] / 16)


def estimated_cycles(tiling: Tiling, m: int, n: int, steps: int) -> float:
    """Estimated cycles of the busiest block.

    A step multiplies one 128-byte row of K. It takes the longest of: the tensor cores (128 cycles for 64 x 256 x 32
    bytes), shared memory (operand reads and load writes, 128 bytes a cycle), and loads from L2 (64 bytes a cycle). The
    epilogue of a tile takes about 20 cycles for each accumulator of a thread; in the alternating schedule it overlaps
    the other consumer's mainloop.
    """
    blocks_of_rows = tiling.tile_m // ROWS_PER_INSTRUCTION
    multiply = blocks_of_rows * 2 * tiling.tile_n
    loaded = (tiling.block_m + tiling.block_n) * BYTES_PER_ROW
    alternate = tiling.schedule == "alternate"
    share = loaded if alternate else loaded / CONSUMERS
    read = blocks_of_rows * (ROWS_PER_INSTRUCTION + tiling.tile_n) * BYTES_PER_ROW
    mainloop = steps * max(multiply, (read + share) / 128, share / 64)
    epilogue = 20 * tiling.tile_m * tiling.tile_n / 128
    tiles = math.ceil(m / tiling.block_m) * math.ceil(n / tiling.block_n)
    turns = math.ceil(tiles / MULTIPROCESSORS)
    if not alternate:
        return turns * (CONSUMERS * mainloop + epilogue)
    return max(turns * mainloop, math.ceil(turns / CONSUMERS) * (mainloop + epilogue)) + epilogue

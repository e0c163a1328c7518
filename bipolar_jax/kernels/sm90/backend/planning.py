"""Which kernel and tiling a product gets: the device's table where it knows the problem, else an estimate."""

from __future__ import annotations

import contextlib
import dataclasses
import math

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ELEMENTS_PER_ROW, ROWS_PER_INSTRUCTION, OperandKind
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import (
    DecodeTiling,
    accumulator_columns,
    decode_tilings,
    parted_tiling,
)
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.tuning.table import nearest_entry

# Up to here the binary tensor cores, 8 times as fast as the int8 ones and with no expansion of the
# weights, take no longer.
MOST_BINARY_PAIRS = 8

# The kind of a table's entries for `decode_matmul`: their m is the columns of the instruction, steps are the weights'.
FEW_TOKENS = "few tokens"

# Of an H100 or H200, for estimates.
_MEMORY_BYTES_PER_CYCLE = 2300  # 4.1 TB/s at 1.755 GHz
_L2_BYTES_PER_CYCLE = 32  # for every multiprocessor, when all load
_LAUNCH_CYCLES = 3500  # one kernel more, 2 us
_SETTLING = 1.4  # in the product of few tokens: for waits between planes; fits n = 22016

# Columns of tiles that are rotated: the registers of more would spill.
MOST_HEAD_COLUMNS = 128

CANDIDATES = (
    Tiling(128, 192, "alternate", slots=4, band=16, band_axis="m"),
    Tiling(128, 128, "alternate", slots=4, band=8, band_axis="n"),
    Tiling(128, 128, "alternate", slots=5, band=8, band_axis="n"),
    Tiling(128, 128, "alternate", slots=6, band=8, band_axis="n"),
    Tiling(64, 192, "alternate", slots=5, band=8, band_axis="n"),
    Tiling(64, 128, "alternate", slots=6, band=8, band_axis="n"),
    Tiling(128, 64, "alternate", slots=6, band=8, band_axis="n"),
    Tiling(64, 64, "alternate", slots=8, band=8, band_axis="n"),
)

# With two accumulators and a float sum, which leaves a third of the tile.
GROUPED_CANDIDATES = (
    Tiling(64, 128, "split_m", slots=5, band=8, band_axis="n"),
    Tiling(128, 64, "split_n", slots=5, band=8, band_axis="n"),
    Tiling(64, 64, "split_m", slots=6, band=8, band_axis="n"),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs.

    Attributes:
      kind: planes on the binary tensor cores ("planes") or bytes on the int8 ones ("int8").
      tiling: shape of the work of one block, of `decode_matmul` or of `packed_matmul`.
      reason: where the tiling comes from.
    """

    kind: OperandKind
    tiling: Tiling | DecodeTiling
    reason: str


def plan_product(
    m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat, group_size: int | None = None
) -> Choice:
    """The plan of x [m, k] times w [k, n], with one scale a column, or one a group."""
    if m <= FEW_TOKENS_LIMIT:
        with contextlib.suppress(Unsupported):
            return _plan_few(m, n, k, a_format, w_format, group_size)
    if group_size is not None:
        steps = mainloop_steps(k, "int8", 1)
        tiling = min(GROUPED_CANDIDATES, key=lambda tiling: estimated_cycles(tiling, m, n, steps))
        return Choice("int8", tiling, "estimated from tile sizes")
    choice = _plan_many(m, n, k, a_format, w_format)
    if m <= FEW_TOKENS_LIMIT:
        tiling = parted_tiling(m, k, a_format.bits)
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
            # Rings as deep as fit this product's tokens.
            if all(getattr(tiling, name) == entry["tiling"][name] for name in ("warpgroups", "x_slots")):
                return Choice("planes", tiling, f"measured at {entry['shape']}")
    return Choice("planes", tilings[0], f"{m} tokens: bound by reading the weights")


def _plan_many(m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat) -> Choice:
    """The plan of `packed_matmul`, with one scale a column."""
    pairs = a_format.bits * w_format.bits
    kind: OperandKind = "planes" if pairs <= MOST_BINARY_PAIRS else "int8"
    steps = mainloop_steps(k, kind, pairs)
    if interpret_params() is None:
        entry = nearest_entry(default_device().device_kind, kind, m, n, steps)
        if entry is not None:
            return Choice(kind, Tiling(**entry["tiling"]), f"measured at {entry['shape']}")
    tiling = min(CANDIDATES, key=lambda tiling: estimated_cycles(tiling, m, n, steps))
    return Choice(kind, tiling, "estimated from tile sizes")


def few_tokens_cycles(
    tiling: DecodeTiling, m: int, n: int, k: int, a_format: BipolarFormat, w_format: BipolarFormat
) -> float:
    """Cycles of `decode_matmul`: reading the weights from memory, or the busiest block.

    For every part of the tokens, plane and 1024 elements of K that takes as long as the tensor cores, or as loading
    from L2 a plane's tile of weights and its share of the tokens'.
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
    """Cycles of `packed_matmul`, after the weights' expansion if it multiplies bytes: they are written, and read."""
    pairs = a_format.bits * w_format.bits
    cycles = estimated_cycles(choice.tiling, m, n, mainloop_steps(k, choice.kind, pairs))
    if choice.kind == "planes":
        return max(cycles, n * k * w_format.bits / 8 / _MEMORY_BYTES_PER_CYCLE)
    expansion = n * k * (1 + w_format.bits / 8) / _MEMORY_BYTES_PER_CYCLE + _LAUNCH_CYCLES
    return expansion + max(cycles, n * k / _MEMORY_BYTES_PER_CYCLE)


def plan_heads(
    sequences: int, length: int, n: int, k: int, head_dim: int, a_format: BipolarFormat, w_format: BipolarFormat
) -> Choice:
    """The plan of a product whose columns are heads, see `prompt_projection`: the measured one if its tiles are heads.

    Raises:
      Unsupported: few tokens, whose product has weights as rows.
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
    """Whether tiles are whole heads and leave registers to rotate them."""
    return tiling.tile_n % head_dim == 0 and tiling.tile_n <= MOST_HEAD_COLUMNS


def _with_staging_of_heads(choice: Choice) -> Choice:
    tiling = with_staging(choice.tiling)
    if tiling == choice.tiling:
        return choice
    return Choice(choice.kind, tiling, f"{choice.reason}, with {tiling.slots} slots to leave room for heads")


def with_staging(tiling: Tiling) -> Tiling:
    """With as few slots for operands as leave one for every piece of a tile.

    Cosines and sines of all of it come there under the mainloop; where there are none, it may be a little slower.
    """
    pieces = dataclasses.replace(tiling, slots=2).staging_slots()
    while tiling.slots > 2 and tiling.staging_slots() < pieces:
        tiling = dataclasses.replace(tiling, slots=tiling.slots - 1)
    return tiling


def mainloop_steps(k: int, kind: OperandKind, pairs: int) -> int:
    """Length of the mainloop, in 128-byte rows of K over all pairs of planes; what tables are keyed by."""
    return -(-k // ELEMENTS_PER_ROW[kind]) * (pairs if kind == "planes" else 1)


def estimated_cycles(tiling: Tiling, m: int, n: int, steps: int) -> float:
    """Cycles of the busiest block.

    A step multiplies one 128-byte row of K. It takes as long as the slowest of: the tensor
    cores (128 cycles for 64 x 256 x 32 bytes), reads of operands and writes of loads in shared
    memory (128 bytes a cycle), and loads from L2 (64 bytes a cycle). Finishing a tile takes about
    20 cycles for each of a thread's numbers, under the other consumer's steps if the schedule
    alternates.
    """
    blocks_of_rows = tiling.tile_m // ROWS_PER_INSTRUCTION
    multiply = blocks_of_rows * 2 * tiling.tile_n
    loaded = (tiling.block_m + tiling.block_n) * BYTES_PER_ROW
    alternate = tiling.schedule == "alternate"
    share = loaded if alternate else loaded / tiling.consumers
    read = blocks_of_rows * (ROWS_PER_INSTRUCTION + tiling.tile_n) * BYTES_PER_ROW
    mainloop = steps * max(multiply, (read + share) / 128, share / 64)
    epilogue = 20 * tiling.tile_m * tiling.tile_n / 128
    tiles = math.ceil(m / tiling.block_m) * math.ceil(n / tiling.block_n)
    turns = math.ceil(tiles / MULTIPROCESSORS)
    if not alternate:
        return turns * (tiling.consumers * mainloop + epilogue)
    return max(turns * mainloop, math.ceil(turns / tiling.consumers) * (mainloop + epilogue)) + epilogue

"""Modelled times of products of tiles: what the busiest block does, counted, times fitted coefficients.

A persistent block takes tiles in turns, so a product takes as long as ceil(tiles / multiprocessors) tiles. The counts
below are of these turns; `tuning/nvidia_h200_costs.json` has microseconds for each, fitted to measurements by
`experiments.bench.fit_costs`, which also says how far the model is off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS, Tiling
from bipolar_jax.packing.fields import STAGE
from bipolar_jax.tuning.costs import coefficients_of

Kernel = Literal["tiles", "expanded"]

_LINE_BYTES = 128  # of the L2 cache
_LOADED_BYTES_PER_CYCLE = 64  # of a multiprocessor
# Loads of w take 1 + _UNSHARED / blocks above each other times as long, up to _MANY_BLOCKS. Of 1, 2 and 3, and of
# 4, 8 and 16, with these the chosen tilings lose least (`experiments.bench.fit_costs`).
_UNSHARED, _MANY_BLOCKS = 2, 8
_SPLITS = (1, 2, 3, 4, 6, 8)
_LEAST_STEPS = 8  # of a split: fewer do not fill the ring buffer
_MOST_TURNS = 2  # of products whose K is split: with more, the last turn is a small part
# Splits must save so much of the modelled time: their sums take memory. With a tenth W4A8 of 134 x 5120 x 28672, and in
# groups of 128 of 101 x 14336 x 28672, stayed whole, and took 1.14 and 1.13 times as long as with splits, which the
# model has at 9 and 5% less (`bench_coverage{,_seed_1}.json` of an H200).
_LEAST_SAVING = 0.02


def tile_counts(
    tiling: Tiling, m: int, n: int, steps: int, passes: int = 1, row_bytes: int = BYTES_PER_ROW
) -> dict[str, float]:
    """Counts of `packed_matmul`, in thousands but for single events.

    Args:
      tiling: of the product.
      m, n: rows and columns of the output.
      steps: of the mainloop, in 128-byte rows over all passes; see `planning.mainloop_steps`.
      passes: over K, one for each pair of planes.
      row_bytes: from a row of an operand to the next one. Where it is no multiple of a line of the L2 cache, a row of a
        step begins within a line and ends in the next: tiles of 64 x 128 took 0.32 us a step where K is 11008, 0.22
        where it is 4096 (W2A4, 2048 x 4096).

    A step takes as long as its products or its loads, whichever take longer. Blocks above each other load the same rows
    of w at the same time; where they are few, the L2 cache gives each less: tiles of 64 x 128 took some 0.4 us a step
    of 134 x 5120 x 28672.
    """
    turns, steps = _turns(tiling, m, n), math.ceil(steps / passes / tiling.splits) * passes
    alternate = tiling.schedule == "alternate"
    # In the alternating schedule one consumer multiplies at a time, a tile of its own; else both, parts of one tile.
    consumers, each = 1 if alternate else CONSUMERS, turns * steps / 1000
    multiplied = (tiling.tile_m // ROWS_PER_INSTRUCTION) * 2 * tiling.tile_n * consumers
    # Of the operands of a tile, what a block does not get from the other one of its cluster.
    above = min(math.ceil(m / tiling.block_m), _MANY_BLOCKS)
    of_x, of_w = tiling.block_m / tiling.cluster_n, tiling.block_n / tiling.cluster_m * (1 + _UNSHARED / above)
    loaded = (of_x + of_w) * BYTES_PER_ROW
    accumulator = tiling.tile_m * tiling.tile_n / 1000
    return {
        "cycles of steps": each * max(multiplied, loaded / _LOADED_BYTES_PER_CYCLE),
        "loaded bytes across lines": each * loaded * _share_across_lines(row_bytes),
        "epilogues in the way": 0.0 if alternate else turns * accumulator,
        "last epilogue": accumulator,
    } | _common_counts(tiling, m, n)


def _share_across_lines(row_bytes: int) -> float:
    """Of an operand's rows, those that begin within a line of the L2 cache."""
    return 1 - math.gcd(row_bytes, _LINE_BYTES) / _LINE_BYTES


def expanded_counts(
    tiling: Tiling, m: int, n: int, k: int, w_bits: int, chunks: int, *, is_float: bool = False
) -> dict[str, float]:
    """Counts of `expanded_matmul`, in thousands but for single events.

    Args:
      tiling: of the product.
      m, n, k: its sizes.
      w_bits: of the weights.
      chunks: of a stage with terms of their own; 0 without groups.
      is_float: whether 16-bit floats are multiplied, whose stages count apart from those of bytes.
    """
    stages = _turns(tiling, m, n) * math.ceil(math.ceil(k / STAGE) / tiling.splits) / 1000
    schedule = "alternate" if tiling.schedule == "alternate" else "shared"
    name = f"stages of floats, {schedule}" if is_float else f"stages, {schedule}"
    return {
        name: stages,
        f"tokens of {name}": stages * tiling.tile_m,
        "stages with groups": stages if chunks else 0.0,
        "further groups of stages": stages * max(0, chunks - 1),
        "stages of fields across bytes": stages if 8 % w_bits else 0.0,
        "last epilogue": float(tiling.tile_m),
    } | _common_counts(tiling, m, n)


def _common_counts(tiling: Tiling, m: int, n: int) -> dict[str, float]:
    is_split = tiling.splits > 1
    return {
        "output": m * n / 1000,
        "kernel": 1.0,
        "sums of splits": tiling.splits * m * n / 1000 if is_split else 0.0,
        "pass over splits": 1.0 if is_split else 0.0,
    }


def _turns(tiling: Tiling, m: int, n: int) -> int:
    """Tiles of the busiest block."""
    tiles = math.ceil(m / (tiling.block_m * tiling.cluster_m)) * math.ceil(n / (tiling.block_n * tiling.cluster_n))
    return math.ceil(tiles * tiling.splits / (MULTIPROCESSORS // tiling.cluster_size))


def microseconds(kernel: Kernel, counts: dict[str, float]) -> float:
    """The modelled time."""
    coefficients = coefficients_of(kernel)
    return sum(coefficients[name] * count for name, count in counts.items())


def tiles_microseconds(
    tiling: Tiling, m: int, n: int, steps: int, passes: int = 1, row_bytes: int = BYTES_PER_ROW
) -> float:
    """The modelled time of `packed_matmul`, with the pass over splits; arguments as of `tile_counts`."""
    return microseconds("tiles", tile_counts(tiling, m, n, steps, passes, row_bytes))


def with_splits(tilings: Iterable[Tiling], m: int, n: int, steps: int, passes: int = 1) -> list[Tiling]:
    """The tilings, and each with those splits of K that may be worth it: where tiles are few, and K is long."""
    return [
        dataclasses.replace(tiling, splits=splits)
        for tiling in tilings
        for splits in _SPLITS
        if splits == 1
        or (_turns(tiling, m, n) <= _MOST_TURNS and splits * _LEAST_STEPS <= steps and splits * passes <= steps)
    ]


def cheapest(times: dict[Tiling, float]) -> Tiling:
    """The tiling with the least time; one with splits of K only where it saves enough."""
    whole = {tiling: time for tiling, time in times.items() if tiling.splits == 1}
    best_whole, best = min(whole, key=whole.get), min(times, key=times.get)
    return best if times[best] < (1 - _LEAST_SAVING) * times[best_whole] else best_whole


def reason(tiling: Tiling) -> str:
    """Where the tiling comes from."""
    splits = f", K in {tiling.splits} parts" if tiling.splits > 1 else ""
    return f"estimated from tile sizes{splits}"

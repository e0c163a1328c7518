"""The plan of a product whose weights are expanded in registers: who takes it, which kernel, and which tiling."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.sm90.backend import cost
from bipolar_jax.kernels.sm90.backend.planning import Choice
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedFloatRecovery
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_microseconds, few_tokens_tiling
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarNumbers, PreparedArray
from bipolar_jax.packing.fields import STAGE, TILE_ROWS
from bipolar_jax.packing.float_terms import FloatTerms
from bipolar_jax.packing.prepared_array import check_preparable

# With these it took 157, 184, 226 and 286 us for 2048 x 14336 x 4096 at W4A8 in groups of 128, on an H200 and with one
# group of products in flight (experiments/results/nvidia_h200/bench_expanded_one_group_in_flight.json).
EXPANDED_CANDIDATES = (
    Tiling(128, 128, "split_n", slots=4, band=8, band_axis="n"),
    Tiling(128, 128, "alternate", slots=7, band=8, band_axis="n"),
    Tiling(64, 128, "split_n", slots=6, band=8, band_axis="n"),
    Tiling(64, 128, "alternate", slots=8, band=8, band_axis="n"),
)

# Tiles of other numbers of tokens than these, with as many slots as fit. Between 64 and 128 they fill the chip where
# those would leave blocks without a last tile, or half of it empty: with K whole W4A16g128 took 60, 88, 74, 34 and 59
# us instead of 68, 99, 84, 42 and 75 at 1728x3072x4096, 704x18944x2560, 2388x2048x5120, 480x6144x4096 and
# 300x4096x14336 (`bench_float_products_widths.json` of an H200). Below 64 they are as narrow as up to 64 tokens allow.
_OF_ANY_WIDTH = EXPANDED_CANDIDATES[2:]
_NARROW, _WIDE = EXPANDED_CANDIDATES[-1].tile_m, EXPANDED_CANDIDATES[0].tile_m

# With float scales of groups: see `gemm_expanded.scaled_multiply`. Tiles of 128 tokens need stages of one chunk, and
# ptxas spills fields of 6 and 7 bits.
SCALED_CANDIDATES = tuple(tiling for tiling in EXPANDED_CANDIDATES if tiling.tile_m == 64)
ONE_CHUNK_CANDIDATES = (EXPANDED_CANDIDATES[0], *SCALED_CANDIDATES)
_BITS_OF_FEW_TOKENS = (6, 7)
# Groups of a multiple of so many elements. By count 128 elements of K issue 510, 822 or 1426 instructions in chunks of
# 128, 64 or 32, in tiles of 64 tokens (`gemm_expanded`); float16 tensor cores take 1024 cycles for them.
_LEAST_SCALED_CHUNK = 64

_SUM_BYTES = 4  # of the sums that splits of K leave in memory
_FEWEST_TILED = 16  # tokens: with more tiles of 64 may be quicker
_LEAST_SAVING = 0.1  # of the modelled time
_LAUNCH, _BYTES_PER_MICROSECOND = 2.0, 3.4e6
# 134 x 5120 x 28672 of 8-bit weights in tiles of 64 tokens loads 645 MB and took 92 us, where multiplying takes 60 by
# the model; 704 x 18944 x 2560 of 4-bit weights in tiles of 128 loads 436 MB in some 50 us
# (`experiments.bench.coverage`).
_L2_BYTES_PER_MICROSECOND = 9e6
# Microseconds of up to 64 tokens that the model of many lacks, which is fitted to longer products: until the first
# weights are there, and of the pass over splits of K, a launch and so much a sum. With them the model has 15.5 and 10.2
# us for 64 tokens of n = 4096, K = 4096, K whole and in 4 parts, which took 14.2 and 8.8; 15.5 and 12.2 of n = 6144,
# in 2 parts, for 14.4 and 11.3; 16.4 of n = 4096, K = 14336 in 4 for 16.1; 22.3 of n = 28672, K = 4096 for 21.2
# (W4A8g128, cold weights, an H200, `experiments.bench.products.few_tokens`).
_COLD_START, _PASS, _SUMS = 4.0, 0.2, 1.8e-6
# Of 16-bit floats: no start is missing, and `prepared_few_tokens` takes longer than its model has by such a factor. 16,
# 32 and 48 tokens of n = 28672, K = 4096 took 24.7, 31.8 and 39.9 us there, and 23.8, 27.7 and 27.9 in tiles of as many
# tokens (W4A16g128, cold weights, calls in a row).
_FEW_FLOATS = 1.25


def is_expanded(w: BipolarNumbers) -> bool:
    """Whether the weights take such a product: they are laid out for it, or have integer groups."""
    return isinstance(w, PreparedArray) or w.has_integer_groups


def has_float_terms(w: BipolarNumbers) -> bool:
    """Whether the weights are prepared with float scales of groups."""
    return float_terms_of(w) is not None


def float_terms_of(w: BipolarNumbers) -> FloatTerms | None:
    """The form of float scales of groups, if the weights are prepared with such."""
    return w.float_terms if isinstance(w, PreparedArray) else None


def becomes_float16(w: BipolarNumbers) -> bool:
    """Whether prompts of quantized activations expand these weights to float16, with the scales of their float groups.

    Of longer groups `gemm_expanded` scales the sums of products of bytes.
    """
    return has_float_terms(w) and w.group_size % _LEAST_SCALED_CHUNK != 0


def plan_expanded(m: int, w: BipolarNumbers, dtype: jnp.dtype, *, gated: bool = False) -> Choice:
    """The plan of m tokens times w, by `prepared_few_tokens` or as `plan_many_tokens` has it; arguments as there.

    Its tiling is a `FewTokensTiling` or a `Tiling` of `gemm_expanded`. From 17 to 64 tokens the cheaper one is taken.
    """
    if m > FEW_TOKENS_LIMIT:
        return plan_many_tokens(m, w, dtype, gated=gated, may_split=True)
    check_layout(w, gated)
    tiling = tiling_of_few_tokens(m, w, dtype, gated=gated)
    if tiling is not None:
        return Choice("int8", tiling, with_layout(cost.reason(tiling), w))
    gated = w.gated if isinstance(w, PreparedArray) else gated
    sizes = (m, w.shape[-1], w.contracted_size, w.bits, chunks_of(w))
    tiling = few_tokens_tiling(*sizes, gated, float_terms=float_terms_of(w))
    return Choice("int8", tiling, with_layout(f"{m} tokens: bound by reading the weights", w))


def tiling_of_few_tokens(
    m: int, w: BipolarNumbers, dtype: jnp.dtype, *, gated: bool = False, is_float: bool = False
) -> Tiling | None:
    """The tiling of up to 64 tokens by `gemm_expanded`, or None where `prepared_few_tokens` is as quick.

    Args:
      m, w, dtype, gated: as of `plan_many_tokens`.
      is_float: whether tokens are 16-bit floats.
    """
    if m <= _FEWEST_TILED or has_float_terms(w):
        return None
    gated = w.gated if isinstance(w, PreparedArray) else gated
    tilings = expanded_times(m, w, dtype, may_split=not gated, is_float=is_float)
    times = {tiling: few_tiles_microseconds(tiling, m, w, is_float=is_float) for tiling in tilings}
    tiling = cost.cheapest(times)
    sizes, rows = (m, w.shape[-1], w.contracted_size, w.bits, chunks_of(w), gated), 2 if is_float else 1
    few_tokens = few_tokens_tiling(*sizes, rows_of_stage=rows)
    few_tokens_time = few_tokens_microseconds(few_tokens, *sizes, rows_of_stage=rows)
    few_tokens_time *= _FEW_FLOATS if is_float else 1
    return tiling if times[tiling] < (1 - _LEAST_SAVING) * few_tokens_time else None


def few_tiles_microseconds(tiling: Tiling, m: int, w: BipolarNumbers, *, is_float: bool = False) -> float:
    """The modelled time of up to 64 tokens by `gemm_expanded`, whose weights come from memory."""
    m_n_k = m, w.shape[-1], w.contracted_size
    counts = cost.expanded_counts(tiling, *m_n_k, w.bits, chunks_of(w), is_float=is_float)
    time = cost.microseconds("expanded", counts | {"sums of splits": 0.0, "pass over splits": 0.0})
    time += 0 if is_float else _COLD_START
    if tiling.splits > 1:
        time += _PASS + _SUMS * tiling.splits * m * w.shape[-1]
    return max(time, _reading_microseconds(w))


def _reading_microseconds(w: BipolarNumbers) -> float:
    """Of reading the weights from memory, with a launch: what the model of many tokens leaves out."""
    tiles = math.ceil(w.shape[-1] / TILE_ROWS) * math.ceil(w.contracted_size / STAGE)
    tile_bytes = TILE_ROWS * (STAGE * w.bits // 8 + 2 * chunks_of(w))
    return _LAUNCH + tiles * tile_bytes / _BYTES_PER_MICROSECOND


def plan_many_tokens(
    m: int, w: BipolarNumbers, dtype: jnp.dtype, *, gated: bool = False, may_split: bool = False
) -> Choice:
    """The plan of m tokens times w by `gemm_expanded`, for an output of `dtype`.

    Args:
      m: tokens.
      w: weights of which `is_expanded` is true.
      dtype: of the output.
      gated: whether a gated activation follows, for which weights that are not prepared will be laid out.
      may_split: whether the output is a matrix, for which blocks may multiply parts of K.

    Raises:
      Unsupported: groups that are no multiple of 16 elements.
    """
    check_layout(w, gated)
    gated = w.gated if isinstance(w, PreparedArray) else gated
    tiling = cost.cheapest(expanded_times(m, w, dtype, may_split=may_split and not gated))
    return Choice("f16" if becomes_float16(w) else "int8", tiling, with_layout(cost.reason(tiling), w))


def expanded_times(
    m: int, w: BipolarNumbers, dtype: jnp.dtype, *, may_split: bool = True, is_float: bool | None = None
) -> dict[Tiling, float]:
    """Modelled microseconds of `gemm_expanded`, by tiling; `is_float` as `problem_of` has it."""
    n, k, itemsize = w.shape[-1], w.contracted_size, jnp.dtype(dtype).itemsize
    stages, is_float = math.ceil(k / STAGE), becomes_float16(w) if is_float is None else is_float
    if has_float_terms(w) and not is_float:
        return {
            tiling: expanded_microseconds(tiling, m, n, k, w)
            for tiling in (fitted(tiling, w, itemsize) for tiling in scaled_candidates(w))
        }
    candidates = whole_candidates(m, is_float=is_float)
    # By the model parts of K would suit tiles below 64 tokens, too; they took twice what it has.
    tilings = [
        split
        for tiling in candidates
        for split in (cost.with_splits([tiling], m, n, stages) if may_split and tiling.tile_m >= _NARROW else [tiling])
    ]
    able = [fitted(tiling, w, itemsize if tiling.splits == 1 else _SUM_BYTES, is_float) for tiling in tilings]
    return {tiling: expanded_microseconds(tiling, m, n, k, w, is_float) for tiling in able}


def whole_candidates(m: int, *, is_float: bool) -> tuple[Tiling, ...]:
    """Tilings of m tokens with K whole: `EXPANDED_CANDIDATES`, and tiles of other widths that m tokens fill.

    Of up to 64 tokens those of 64, and such that are as narrow as they can be.
    """
    step = 8 if is_float else 16  # of the instructions' widths
    needed = step * math.ceil(m / step)
    if needed > _NARROW:
        tilings, widths = EXPANDED_CANDIDATES, range(_NARROW + step, min(_WIDE, needed + step), step)
    else:
        tilings, widths = _OF_ANY_WIDTH, [needed] if needed < _NARROW else []
    # Of equal times the first is taken.
    further = [dataclasses.replace(tiling, tile_m=width) for width in widths for tiling in _OF_ANY_WIDTH]
    return (*tilings, *further) if needed > _NARROW else (*further, *tilings)


def scaled_candidates(w: BipolarNumbers) -> tuple[Tiling, ...]:
    """The tilings of weights with float scales of groups."""
    return ONE_CHUNK_CANDIDATES if chunks_of(w) == 1 and w.bits not in _BITS_OF_FEW_TOKENS else SCALED_CANDIDATES


def expanded_microseconds(
    tiling: Tiling, m: int, n: int, k: int, w: BipolarNumbers, is_float: bool | None = None
) -> float:
    """The modelled time of m tokens times n columns of weights like these; `is_float` as `problem_of` has it.

    Not less than the L2 cache takes to hand out what all blocks load: 8-bit weights that three tiles of tokens read.
    """
    problem = problem_of(tiling, w, is_float)
    counts = cost.expanded_counts(tiling, m, n, k, w.bits, chunks_of(w), is_float=problem.is_float)
    time = cost.microseconds("expanded", counts)
    passed = cost.microseconds("expanded", {name: counts[name] for name in ("sums of splits", "pass over splits")})
    # Clusters are not counted as sharing what they load.
    tiles = math.ceil(m / tiling.block_m) * math.ceil(n / tiling.block_n)
    stages = tiling.splits * math.ceil(math.ceil(k / STAGE) / tiling.splits)
    return max(time, passed + _LAUNCH + tiles * stages * problem.stage_bytes / _L2_BYTES_PER_MICROSECOND)


def with_layout(reason: str, w: BipolarNumbers) -> str:
    """A plan's reason, and what the weights' layout costs."""
    if isinstance(w, PreparedArray):
        return reason
    return f"{reason}; lays the weights out in every call, prepare_for_inference once"


def check_layout(w: BipolarNumbers, gated: bool) -> None:
    """Raises Unsupported unless the weights are laid out for the tensor cores, or can be."""
    if isinstance(w, PreparedArray):
        return
    try:
        check_preparable(w, gated)
    except ValueError as reason:
        raise Unsupported(str(reason)) from reason


def describe_expanded(m: int, w: BipolarNumbers) -> str:
    """The kernel of m tokens in words."""
    kind = "float" if has_float_terms(w) else "integer"
    groups = f" in {kind} groups of {w.group_size}" if w.has_integer_groups or kind == "float" else ""
    if becomes_float16(w) and m > FEW_TOKENS_LIMIT:
        return f"float16 tensor cores, weights of {w.bits} bits{groups} expanded to float16 in registers"
    return f"int8 tensor cores, weights of {w.bits} bits{groups} expanded in registers"


def fitted(tiling: Tiling, w: BipolarNumbers, itemsize: int, is_float: bool | None = None) -> Tiling:
    """The tiling with as many slots as shared memory holds, for an output of `itemsize` bytes a number.

    `is_float` is as `problem_of` has it.
    """
    while tiling.slots > 2 and problem_of(tiling, w, is_float).shared_memory_bytes(itemsize) > SHARED_MEMORY_BYTES:
        tiling = dataclasses.replace(tiling, slots=tiling.slots - 1)
    return tiling


def chunks_of(w: BipolarNumbers) -> int:
    """As `PreparedArray.chunks`."""
    return STAGE // math.gcd(w.group_size, STAGE) if w.has_integer_groups or has_float_terms(w) else 0


def problem_of(tiling: Tiling, w: BipolarNumbers, is_float: bool | None = None, n: int = TILE_ROWS) -> ExpandedProblem:
    """A problem with weights like these, for its sizes in shared memory.

    Args:
      tiling: of the product.
      w: the weights.
      is_float: whether 16-bit floats are multiplied; of quantized tokens, None, what `becomes_float16` says.
      n: columns of the output.
    """
    recovery, float_terms = None, float_terms_of(w)
    if becomes_float16(w) if is_float is None else is_float:
        recovery = ExpandedFloatRecovery("f16", w.contracted_size, w.format, chunks_of(w) > 0)
        float_terms = None if float_terms is None else "offsets"
    of_weights = {"w_bits": w.bits, "chunks": chunks_of(w), "float_terms": float_terms}
    return ExpandedProblem(1, n, recovery, tiling, **of_weights)

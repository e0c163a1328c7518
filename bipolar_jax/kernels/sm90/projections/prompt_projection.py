"""The joined query, key and value product of prompts; its output is heads, rotated and written to the cache.

One kernel computes the product, splits it into heads, rotates queries and keys, and writes keys and values in the order
of the cache. Separate kernels would read the product again. A tile's tokens belong to one sequence, its columns are
whole heads.

Weights that are prepared, or have integer groups, take the product of expanded weights; others that of planes or bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int16, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics.prologue import Prologue, RMSNorm
from bipolar_jax.kernels.semantics.rotation import FixedPointTables
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.expanded_planning import (
    EXPANDED_CANDIDATES,
    SCALED_CANDIDATES,
    becomes_float16,
    describe_expanded,
    expanded_microseconds,
    has_float_terms,
    is_expanded,
    plan_many_tokens,
    problem_of,
    scaled_candidates,
)
from bipolar_jax.kernels.sm90.backend.expanded_products import laid_out, many_tokens_operands
from bipolar_jax.kernels.sm90.backend.operations import describe, quantized_operands, shared_scale
from bipolar_jax.kernels.sm90.backend.planning import Choice, plan_heads
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm import launch as gemm
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm.outputs.heads import HeadOutput
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.kernels.sm90.gemm_expanded import launch as gemm_expanded
from bipolar_jax.kernels.sm90.gemm_expanded.heads import TransposedHeadOutput, with_room_for_heads
from bipolar_jax.kernels.sm90.gemm_expanded.launch import SummedTokens
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedFloatRecovery, ExpandedRecovery, ScaledRecovery
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarArray, BipolarNumbers, PreparedArray
from bipolar_jax.packing.fields import TILE_ROWS

HEAD_SIZES = (64, 128)
# Of the product of expanded weights. Alternating tiles of 128 tokens would spill.
EXPANDED_TILINGS = tuple(each for each in EXPANDED_CANDIDATES if each.tile_m == 64 or each.schedule == "split_n")
_DTYPES = (jnp.bfloat16, jnp.float16)

Cache = Float[Array, "layers batch kv_heads capacity head_dim"]
Heads = Float[Array, "batch length _ head_dim"]  # queries have more heads than keys


def prompt_heads(
    x: Float[Array, "batch length columns"],
    w: BipolarArray | PreparedArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None = None,
    head_norms: tuple[RMSNorm, RMSNorm] | None = None,
) -> tuple[Heads, Heads, Heads, Cache, Cache]:
    """x @ w + bias as heads; keys and values also go to the first `length` positions of one layer of the cache.

    The product is that of `operations.quantized_matmul` in float32. Queries and keys are rotated before they are
    rounded to x's dtype: once, where a rotation after the product would round twice. The layer's positions from
    `length` on become zeros.

    Args:
      x: bfloat16 or float16; as wide as w's k, or, with a prologue, as wide as its input.
      w: weights [k, n] of the heads of queries, keys and values, side by side, packed or prepared. Packed ones with
        integer groups are prepared here.
      a_format: to quantize x to.
      bias: added to every row.
      prologue: a norm or an activation function of x.
      keys, values: the whole cache, of x's dtype; updated in place if the caller donates them.
      layer: index of the cache's layer.
      tables: cosines and sines of positions from 0 on, see `semantics.rotation`. Queries and keys are rotated by them
        in pairs (d, d + head_dim / 2), as `models.blocks.rope.rotate` does. Rows beyond `length` are ignored, but save
        a copy where they fill up tiles. None: no rotation.
      head_norms: of each head of queries and of keys, before the rotation; of one epsilon.

    Returns:
      q, k and v, [batch, length, heads, head_dim] in x's dtype; keys; values.

    Raises:
      ValueError: prompts longer than the cache; shapes that do not fit.
      Unsupported: float32, or a cache of another dtype; a head size that is none of HEAD_SIZES; prompts of less than
        64 tokens; float scales of groups that are not prepared; integer ones of no multiple
        of 16 elements; gated weights; norms of heads that are not of 128 numbers, not rotated, or of weights that are
        not expanded in registers; rows too long to quantize on chip.
    """
    layout = _layout(x, w, keys, values, tables, head_norms)
    batch, length, columns = x.shape
    rows, interpret = x.reshape(-1, columns), interpret_params()
    if is_expanded(w):
        choice = plan_expanded_heads(batch, length, w, layout)
        tokens = quantize_and_pack(rows, a_format, "int8", prologue=prologue, interpret=interpret)
        operands = many_tokens_operands(tokens, laid_out(w), a_format, bias)
        project = functools.partial(project_expanded_heads, gains=_gains(head_norms))
    else:
        choice = plan_heads(batch, length, layout.columns, w.contracted_size, layout.size, a_format, w.format)
        operands = quantized_operands(rows, w, a_format, bias, choice, prologue)
        project = project_heads
    return project(*operands, choice.tiling, layout, keys, values, layer, tables, length=length, interpret=interpret)


def plan_prompt_heads(
    x: Float[Array, "batch length columns"],
    w: BipolarArray | PreparedArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None = None,
    head_norms: tuple[RMSNorm, RMSNorm] | None = None,
) -> Plan:
    """What `prompt_heads` would run for these operands; raises as it would."""
    del bias, prologue, layer
    layout = _layout(x, w, keys, values, tables, head_norms)
    batch, length, _ = x.shape
    if is_expanded(w):
        choice, kernel = plan_expanded_heads(batch, length, w, layout), describe_expanded(batch * length, w)
    else:
        choice = plan_heads(batch, length, layout.columns, w.contracted_size, layout.size, a_format, w.format)
        kernel = describe(choice, w, a_format)
    rotated = "" if tables is None else "rotated and "
    rotated = rotated if head_norms is None else f"normalized, {rotated}"
    return Plan(f"{kernel}, heads {rotated}written to the cache", choice.reason, choice.tiling)


def plan_expanded_heads(sequences: int, length: int, w: BipolarNumbers, layout: HeadLayout) -> Choice:
    """The plan of heads by the product of expanded weights.

    Raises:
      Unsupported: groups of no multiple of 16 elements.
    """
    choice = plan_many_tokens(sequences * length, w, jnp.dtype(jnp.float32))

    def microseconds(tiling: Tiling) -> float:
        return expanded_microseconds(tiling, length, sequences * layout.columns, w.contracted_size, w)

    tilings = EXPANDED_TILINGS
    if has_float_terms(w) and not becomes_float16(w):
        # Heads of 64 exchange numbers: of 128 tokens ptxas spills.
        tilings = scaled_candidates(w) if layout.size == TILE_ROWS else SCALED_CANDIDATES
    tiling = min(tilings, key=microseconds)
    tiling = with_room_for_heads(problem_of(tiling, w, n=layout.columns), layout)
    return dataclasses.replace(choice, tiling=tiling)


def _gains(head_norms: tuple[RMSNorm, RMSNorm] | None) -> tuple[Array, Array] | None:
    """Those of queries and keys in a dtype that the kernel loads."""
    if head_norms is None:
        return None
    gains = [norm.gain for norm in head_norms]
    return tuple(gain if gain.dtype in (jnp.bfloat16, jnp.float32) else gain.astype(jnp.float32) for gain in gains)


def _layout(
    x: Float[Array, "batch length columns"],
    w: BipolarNumbers,
    keys: Cache,
    values: Cache,
    tables: FixedPointTables | None,
    head_norms: tuple[RMSNorm, RMSNorm] | None,
) -> HeadLayout:
    """What the columns of w are. Raises as `prompt_heads` does, except for tilings and rows too long to quantize."""
    batch, length, _ = x.shape
    _, cache_batch, kv_heads, capacity, head_dim = keys.shape
    n, dtype = w.shape[-1], x.dtype
    norm_eps = None if head_norms is None else head_norms[0].eps
    layout = HeadLayout(n // head_dim - 2 * kv_heads, kv_heads, head_dim, capacity, norm_eps)
    if length > capacity:
        raise ValueError(f"a cache of {capacity=} positions cannot hold prompts padded to {length} tokens")
    if layout.columns != n or layout.queries < 1 or cache_batch != batch or values.shape != keys.shape:
        raise ValueError(
            f"{batch} prompts and {n} columns do not fit caches of shapes {keys.shape} and {values.shape}: "
            "columns are heads of queries, keys and values"
        )
    if dtype not in _DTYPES or keys.dtype != dtype or values.dtype != dtype:
        raise Unsupported(f"heads leave as bfloat16 or float16 to a cache of the same, not {dtype.name}")
    if head_dim not in HEAD_SIZES:
        raise Unsupported(f"heads must have 64 or 128 numbers, not {head_dim}")
    if length < ROWS_PER_INSTRUCTION:
        raise Unsupported(f"prompts of {length} tokens do not fill tiles of {ROWS_PER_INSTRUCTION}")
    if isinstance(w, PreparedArray) and w.gated:
        raise Unsupported("gates and their values are no heads")
    if not is_expanded(w) and shared_scale(w) is not None:
        raise Unsupported("float scales of groups leave no registers to rotate heads in")
    if head_norms is not None:
        _check_head_norms(head_norms, w, head_dim, tables)
    return layout


def _check_head_norms(
    head_norms: tuple[RMSNorm, RMSNorm], w: BipolarNumbers, head_dim: int, tables: FixedPointTables | None
) -> None:
    """Raises Unsupported unless the kernel normalizes heads of queries and keys so."""
    if not is_expanded(w):
        raise Unsupported("norms of queries and keys are computed with weights laid out for tensor cores alone")
    if head_dim != 128 or tables is None:
        which = f"of {head_dim}" if tables is not None else "without a rotation"
        raise Unsupported(f"norms of queries and keys are computed of rotated heads of 128, not of heads {which}")
    if head_norms[0].eps != head_norms[1].eps:
        raise Unsupported(f"norms of queries and keys have epsilons {head_norms[0].eps} and {head_norms[1].eps}")


def project_heads(
    x_words: UInt32[Array, "x_planes rows x_words"],
    w_words: UInt32[Array, "w_planes n w_words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    tiling: Tiling,
    layout: HeadLayout,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None,
    *,
    length: int,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Heads, Heads, Heads, Cache, Cache]:
    """`packed_matmul` of prompts of `length` rows each, whose output is heads; see there and `prompt_heads`.

    Tiles have whole heads, and at most `planning.MOST_HEAD_COLUMNS` columns.
    """
    problem = Problem(length, layout.columns, recovery, tiling, blocks, sequences=keys.shape[1])
    run = functools.partial(gemm.launch, problem, (x_words, w_words), interpret=interpret)
    return _project(problem, run, HeadOutput, tokens, columns, layout, keys, values, layer, tables)


def project_expanded_heads(
    x_words: UInt32[Array, "1 rows x_words"] | SummedTokens,
    weights: PreparedArray,
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: ExpandedRecovery | ScaledRecovery | ExpandedFloatRecovery,
    tiling: Tiling,
    layout: HeadLayout,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None,
    *,
    length: int,
    gains: tuple[Array, Array] | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Heads, Heads, Heads, Cache, Cache]:
    """`expanded_matmul` of prompts of `length` rows each, whose output is heads; see there and `prompt_heads`."""
    problem = ExpandedProblem(
        length,
        layout.columns,
        recovery,
        tiling,
        blocks,
        sequences=keys.shape[1],
        w_bits=weights.bits,
        chunks=weights.chunks,
        float_terms=weights.float_terms,
    )
    run = functools.partial(gemm_expanded.launch, problem, x_words, weights, interpret=interpret)
    output_class = functools.partial(TransposedHeadOutput, gains=gains)
    return _project(problem, run, output_class, tokens, columns, layout, keys, values, layer, tables)


def _project(
    problem: Problem,
    run: Callable[..., list[Array]],
    output_class: Callable[..., HeadOutput],
    tokens: TokenTerms,
    columns: ColumnTerms,
    layout: HeadLayout,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None,
) -> tuple[Heads, Heads, Heads, Cache, Cache]:
    """Runs the kernel of a product, as a function of both kinds of terms and its output, with heads as the output."""
    batch, length = problem.sequences, problem.m
    if batch > 1:  # vectors may be longer than there are tokens
        tokens = jax.tree.map(lambda term: term[: batch * length], tokens)
    if tables is not None:
        tables = tuple(_padded_table(table, problem.covered_tokens, keys.dtype) for table in tables)
    caches = [jax.new_ref(array) for array in (keys, values)]
    output = output_class(keys=caches[0], layer=layer.reshape(1), tables=tables, values=caches[1], layout=layout)
    joined = run(tokens, columns, output)
    q, k, v = (heads.reshape(batch, length, -1, layout.size) for heads in joined)
    return q, k, v, *(jax.freeze(ref) for ref in caches)


def _padded_table(table: Int16[Array, "length half"], rows: int, dtype: jnp.dtype) -> Float[Array, "rows half"]:
    """A table with zeros up to `rows`, its bits as numbers of the dtype of the staging slots that it arrives in."""
    missing = rows - table.shape[0]
    table = jnp.pad(table, ((0, missing), (0, 0))) if missing > 0 else table
    return lax.bitcast_convert_type(table, dtype)

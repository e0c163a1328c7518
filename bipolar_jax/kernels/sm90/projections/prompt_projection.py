"""The joined query, key and value product of prompts; its output is heads, rotated and written to the cache.

One kernel computes the product, splits it into heads, rotates queries and keys, and writes keys and values in the order
of the cache. Separate kernels would read the product again. A tile's rows belong to one sequence, its columns are whole
heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int16, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.kernels.semantics.rotation import FixedPointTables
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.operations import describe, quantized_operands, shared_scale
from bipolar_jax.kernels.sm90.backend.planning import Choice, plan_heads
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.launch import launch
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm.outputs.heads import HeadOutput
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarArray

HEAD_SIZES = (64, 128)
_DTYPES = (jnp.bfloat16, jnp.float16)

Cache = Float[Array, "layers batch kv_heads capacity head_dim"]
Heads = Float[Array, "batch length _ head_dim"]  # queries have more heads than keys


def prompt_heads(
    x: Float[Array, "batch length columns"],
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None = None,
) -> tuple[Heads, Heads, Heads, Cache, Cache]:
    """x @ w + bias as heads; keys and values also go to the first `length` positions of one layer of the cache.

    The product is that of `operations.quantized_matmul` in float32. Queries and keys are rotated before they are
    rounded to x's dtype: once, where a rotation after the product would round twice. The layer's positions from
    `length` on become zeros.

    Args:
      x: bfloat16 or float16; as wide as w's k, or, with a prologue, as wide as its input.
      w: packed weights [k, n] of the heads of queries, keys and values, side by side.
      a_format: to quantize x to.
      bias: added to every row.
      prologue: a norm or an activation function of x.
      keys, values: the whole cache, of x's dtype; updated in place if the caller donates them.
      layer: index of the cache's layer.
      tables: cosines and sines of positions from 0 on, see `semantics.rotation`. Queries and keys are rotated by them
        in pairs (d, d + head_dim / 2), as `models.blocks.rope.rotate` does. Rows beyond `length` are ignored, but save
        a copy where they fill up tiles. None: no rotation.

    Returns:
      q, k and v, [batch, length, heads, head_dim] in x's dtype; keys; values.

    Raises:
      ValueError: prompts longer than the cache; shapes that do not fit.
      Unsupported: float32, or a cache of another dtype; a head size that is none of HEAD_SIZES; prompts of less than
        64 tokens; weights with groups; rows too long to quantize on chip.
    """
    choice, layout = _choose(x, w, a_format, keys, values)
    _, length, columns = x.shape
    operands = quantized_operands(x.reshape(-1, columns), w, a_format, bias, choice, prologue)
    return project_heads(
        *operands, choice.tiling, layout, keys, values, layer, tables, length=length, interpret=interpret_params()
    )


def plan_prompt_heads(
    x: Float[Array, "batch length columns"],
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
    keys: Cache,
    values: Cache,
    layer: Int[Array, ""],
    tables: FixedPointTables | None = None,
) -> Plan:
    """What `prompt_heads` would run for these operands; raises as it would."""
    del bias, prologue, layer
    choice, _ = _choose(x, w, a_format, keys, values)
    rotated = "" if tables is None else "rotated and "
    return Plan(f"{describe(choice, w, a_format)}, heads {rotated}written to the cache", choice.reason, choice.tiling)


def _choose(
    x: Float[Array, "batch length columns"], w: BipolarArray, a_format: BipolarFormat, keys: Cache, values: Cache
) -> tuple[Choice, HeadLayout]:
    """The plan of `prompt_heads`. Raises as it does, except for rows too long to quantize."""
    batch, length, _ = x.shape
    _, cache_batch, kv_heads, capacity, head_dim = keys.shape
    n, dtype = w.planes.shape[-2], x.dtype
    layout = HeadLayout(n // head_dim - 2 * kv_heads, kv_heads, head_dim, capacity)
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
    if shared_scale(w) is not None:
        raise Unsupported("groups of weights leave no registers to rotate heads in")
    choice = plan_heads(batch, length, n, w.contracted_size, head_dim, a_format, w.format)
    return choice, layout


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
    batch = keys.shape[1]
    problem = Problem(length, layout.columns, recovery, tiling, blocks, sequences=batch)
    if batch > 1:  # vectors may be longer than there are tokens
        tokens = jax.tree.map(lambda term: term[: batch * length], tokens)
    if tables is not None:
        tables = tuple(_padded_table(table, problem.covered_tokens, keys.dtype) for table in tables)
    caches = [jax.new_ref(array) for array in (keys, values)]
    output = HeadOutput(keys=caches[0], layer=layer.reshape(1), tables=tables, values=caches[1], layout=layout)
    joined = launch(problem, (x_words, w_words), tokens, columns, output, interpret=interpret)
    q, k, v = (heads.reshape(batch, length, -1, layout.size) for heads in joined)
    return q, k, v, *(jax.freeze(ref) for ref in caches)


def _padded_table(table: Int16[Array, "length half"], rows: int, dtype: jnp.dtype) -> Float[Array, "rows half"]:
    """A table with zeros up to `rows`, its bits as numbers of the dtype of the staging slots that it arrives in."""
    missing = rows - table.shape[0]
    table = jnp.pad(table, ((0, missing), (0, 0))) if missing > 0 else table
    return lax.bitcast_convert_type(table, dtype)

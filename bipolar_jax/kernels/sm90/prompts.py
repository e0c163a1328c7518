"""Heads of whole prompts on their way from the projections to attention and to the cache, in one pass over them.

What was projected is read once; queries and keys are rotated; all of it is written as attention wants it, and keys and
values once more where the cache has them. A block takes some heads of a run of positions. They arrive by TMA, each head
in a slot of its own, are rotated where they lie, and leave by TMA. Positions beyond the prompts arrive as zeros;
attention gets none of them, its arrays ending before them, and the cache all, so that it is written to its end.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.attention_plan import rows_layout

# Of a block. Its 48 KB of 16-bit heads of 128 numbers, and of tables, are on their way at the same time, for 4 blocks
# of a multiprocessor: counted, several times what hides the memory's latency.
_POSITIONS, _HEADS = 32, 4
_COPY_UNIT = 16  # bytes, of the strides of what is copied
_MOST_COLUMNS = 256  # of what is copied at once

Heads = Float[Array, "batch length heads head_dim"]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Queries, keys or values.

    Attributes:
      array: which of those projected they are in.
      first: their first head there.
      heads: how many.
      rotated: whether they are.
      first_group: which of the groups of heads, over all parts, is their first.
    """

    array: int
    first: int
    heads: int
    rotated: bool
    first_group: int

    @property
    def groups(self) -> int:
        return -(-self.heads // _HEADS)


def prompt_heads(
    projected: tuple[Heads, ...],
    keys: Float[Array, "layers batch kv_heads capacity head_dim"],
    values: Float[Array, "layers batch kv_heads capacity head_dim"],
    layer: Int[Array, ""],
    *,
    tables: tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[tuple[Heads, Heads, Heads], Array, Array]:
    """Rotates queries and keys, and fills the cache's layer: the prompts, then zeros up to its capacity.

    Args:
      projected: of the prompts; q, k and v, or one array with all their heads in this order.
      keys, values: of the whole cache. They are written in place where the caller gives them away.
      layer: the cache's layer.
      tables: cosines and sines that q and k are rotated by, float32, as `models.rope.rotate` does.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      q, k and v, in their dtype; keys; values.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: a cache of another dtype, or head_dim that it does not serve.
    """
    _, batch, kv_heads, capacity, head_dim = keys.shape
    length, dtype = projected[0].shape[1], projected[0].dtype
    heads = sum(x.shape[2] for x in projected) - 2 * kv_heads
    expected = [(heads, kv_heads, kv_heads), (heads + 2 * kv_heads,)]
    if (
        heads < 1
        or tuple(x.shape[2] for x in projected) not in expected
        or any((*x.shape[:2], x.shape[3]) != (batch, length, head_dim) for x in projected)
        or length > capacity
    ):
        shapes = ", ".join(str(x.shape) for x in projected)
        raise ValueError(f"heads of shapes {shapes} do not fit a cache of shape {keys.shape}")
    _check_served(head_dim, dtype, keys.dtype, tables is not None)
    parts, groups = [], 0
    for array, (first, count) in enumerate(((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads))):
        joined = len(projected) == 1
        parts.append(_Part(*(0, first) if joined else (array, 0), count, tables is not None and array < 2, groups))
        groups += parts[-1].groups
    cache = [jax.new_ref(array) for array in (keys, values)]
    slots = {
        "slots": plgpu.SMEM((_HEADS, _POSITIONS, head_dim), dtype),
        "arrived": plgpu.Barrier(num_barriers=_HEADS),
    }
    if tables is not None:
        slots["table_slots"] = plgpu.SMEM((2, _POSITIONS, head_dim // 2), jnp.float32)
        slots["tables_arrived"] = plgpu.Barrier(num_arrivals=2)
    ready = plgpu.kernel(
        functools.partial(_kernel, tuple(parts), length, len(projected)),
        out_type=[jax.ShapeDtypeStruct((batch, length, part.heads, head_dim), dtype) for part in parts],
        # The last axis goes round first: blocks at work together are at the same positions.
        grid=(batch, pl.cdiv(capacity, _POSITIONS), groups),
        grid_names=("sequence", "run", "group"),
        scratch_types=slots,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(layer.reshape(1), *projected, *(tables or ()), *cache)
    return tuple(ready), *map(jax.freeze, cache)


def _check_served(head_dim: int, dtype: jnp.dtype, cache_dtype: jnp.dtype, rotated: bool) -> None:
    if dtype != cache_dtype:
        raise NotImplementedError(f"heads are {dtype}, the cache has {cache_dtype}: XLA converts them")
    if head_dim * dtype.itemsize % _COPY_UNIT or head_dim > _MOST_COLUMNS:
        raise NotImplementedError(
            f"heads must have a multiple of {_COPY_UNIT} bytes and at most {_MOST_COLUMNS} numbers, not {head_dim} of "
            f"{dtype}: XLA serves others"
        )
    if rotated:
        rows_layout(head_dim // 2, 1)


def _kernel(
    parts: tuple[_Part, ...],
    length: int,
    num_projected: int,
    layer,
    *refs,
    slots,
    arrived,
    table_slots=None,
    tables_arrived=None,
):
    projected, tables, cache = refs[:num_projected], refs[num_projected:-5], refs[-5:-3]
    ready = refs[-3:]
    sequence, run, group = (lax.axis_index(name) for name in ("sequence", "run", "group"))
    positions, layer = pl.ds(run * _POSITIONS, _POSITIONS), layer[0]
    in_prompts = run * _POSITIONS < length

    def move(part: _Part, attention, kept):
        """A group of heads of one part, to attention's array and to the cache's."""
        first = (group - part.first_group) * _HEADS

        def each_head(body):
            for i in range(_HEADS):
                if part.heads % _HEADS:
                    pl.when(first + i < part.heads)(functools.partial(body, i))
                else:
                    body(i)

        @each_head
        def _(i):
            # [positions, head_dim]
            source = projected[part.array].at[sequence, positions, part.first + first + i]
            plgpu.copy_gmem_to_smem(source, slots.at[i], arrived.at[i])

        if part.rotated:
            # [positions, half] each
            for i, table in enumerate(tables):
                plgpu.copy_gmem_to_smem(table.at[sequence, positions], table_slots.at[i], tables_arrived)
            plgpu.barrier_wait(tables_arrived)
            half = table_slots.shape[-1]
            layout = rows_layout(half, 16 // slots.dtype.itemsize)
            load = functools.partial(plgpu.load, layout=layout, optimized=False)
            cos, sin = (load(table_slots.at[i]) for i in range(2))

        @each_head
        def _(i):
            plgpu.barrier_wait(arrived.at[i])
            slot = slots.at[i]
            if part.rotated:
                low, high = slot.at[:, :half], slot.at[:, half:]
                a, b = (load(side).astype(jnp.float32) for side in (low, high))
                low[...] = (a * cos - b * sin).astype(slot.dtype)
                high[...] = (b * cos + a * sin).astype(slot.dtype)
                plgpu.commit_smem()

            @pl.when(in_prompts)
            def _():
                plgpu.copy_smem_to_gmem(slot, attention.at[sequence, positions, first + i])

            if kept is not None:
                plgpu.copy_smem_to_gmem(slot, kept.at[layer, sequence, first + i, positions])

        plgpu.wait_smem_to_gmem(0)

    for part, attention, kept in zip(parts, ready, (None, *cache), strict=True):
        wanted = (group >= part.first_group) & (group < part.first_group + part.groups)
        if kept is None:
            wanted &= in_prompts
        pl.when(wanted)(functools.partial(move, part, attention, kept))

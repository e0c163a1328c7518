"""Tokens quantized within the product's kernel, while its ring of weights fills.

Every block needs the bytes of all tokens. The blocks of a cluster quantize some of them each, a warpgroup a token, and
send them to the others through shared memory: bytes, the grid, and the sum of the codes (`core.cluster`). The tokens
stay in shared memory for all units of the block.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.arithmetic.epilogue import TokenTerms
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.cluster import (
    MAILBOX_WORDS,
    Section,
    await_mail,
    expect_mail,
    open_mailbox,
    send_mail,
)
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted, with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.ptx import SHARED, Value
from bipolar_jax.kernels.sm90.core.sync import arrive_at_cluster, await_cluster
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensProblem
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import SCRATCH_WORDS, RowThreads
from bipolar_jax.kernels.sm90.quantize_rows.twin import quantized_slot

# The kernel's keyword arguments that `scratch_of` describes, beside `x_ring`.
REFS = ("records", "quantizer_scratch", "vector_slots", "floats_arrived", "vectors_arrived", "quantized")
RECORD_WORDS = 4  # of a token: the sum of its codes, the code of zero, its scale, and one that is not used
_SEGMENT = 16  # bytes
_BLOCKS_OF_ROW = 4  # blocks of 32 numbers in a row of 128 bytes
_ROWS_OF_SWIZZLE = 8
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a copy is one bulk copy of bytes


def own_tokens(problem: FewTokensProblem, interpreted: bool) -> int:
    """Tokens that a block quantizes, at most: all of them in interpret mode, which has no clusters."""
    return problem.m if interpreted else problem.float_rows.own_tokens(problem.tiling)


def scratch_of(problem: FewTokensProblem, inputs: list[Any], interpreted: bool) -> dict[str, Any]:
    """Scratch specifications beside `float_slots`, keyed by the keyword arguments of the kernel."""
    vectors, own = inputs[1:], own_tokens(problem, interpreted)
    return dict(
        x_ring=plgpu.SMEM((problem.float_rows.kept_tokens, problem.token_rows, WORDS_PER_ROW), jnp.uint32),
        # The last row is the mailbox.
        records=plgpu.SMEM((problem.width + 1, RECORD_WORDS), jnp.int32),
        quantizer_scratch=plgpu.SMEM((problem.tiling.warpgroups, SCRATCH_WORDS), jnp.int32),
        vector_slots=[plgpu.SMEM(vector.shape, vector.dtype) for vector in vectors],
        floats_arrived=plgpu.Barrier(num_barriers=own),
        vectors_arrived=plgpu.Barrier(num_arrivals=len(vectors)) if vectors else None,
        quantized=plgpu.Barrier(num_arrivals=problem.tiling.warpgroups),
    )


def float_slots(problem: FewTokensProblem, rows: Any, interpreted: bool) -> plgpu.SMEM:
    """A slot for each token of the block; the memory is that of sums, which come later."""
    return plgpu.SMEM((own_tokens(problem, interpreted), 1, rows.shape[1]), rows.dtype)


def _sends(problem: FewTokensProblem) -> bool:
    return problem.tiling.quantizers > 1 and not is_interpreted()


def _token(problem: FewTokensProblem, index: Any) -> Any:
    """The block's index-th token."""
    return index if is_interpreted() else index * problem.tiling.quantizers + lax.axis_index("rank")


def load_floats(problem: FewTokensProblem, inputs: list[Any], slots: Any, refs: dict[str, Any]) -> None:
    """The producer's part: loads the block's tokens and the prologue's vectors, before any weights."""
    rows, *vectors = inputs
    if _sends(problem):
        arrive_at_cluster()
    for index in range(slots.shape[0]):
        token = _token(problem, index)

        @pl.when(token < problem.m)
        def _(index=index, token=token):
            arrived = refs["floats_arrived"].at[index]
            plgpu.copy_gmem_to_smem(rows.at[pl.ds(token, 1)], slots.at[index], arrived, oob_mode=IN_BOUNDS)

    for vector, slot in zip(vectors, refs["vector_slots"], strict=True):
        plgpu.copy_gmem_to_smem(vector, slot, refs["vectors_arrived"], oob_mode=IN_BOUNDS)


def leave_cluster(problem: FewTokensProblem, *, received: bool) -> None:
    """Waits until the other blocks have what this block sends: copies read its memory.

    Args:
      problem: the static side.
      received: whether the calling threads have been to `quantize_tokens`.
    """
    if _sends(problem):
        if not received:
            await_cluster()  # for the mailboxes
            arrive_at_cluster()
        await_cluster()


def quantize_tokens(problem: FewTokensProblem, slots: Any, refs: dict[str, Any], warpgroup: Int[Array, ""]) -> None:
    """A consumer's part: quantizes this warpgroup's tokens, and waits until all tokens are in this block."""
    tiling, blocks, own = problem.tiling, problem.tiling.quantizers, slots.shape[0]
    x_ring, records, vectors = (refs[name] for name in ("x_ring", "records", "vector_slots"))
    mailbox = records.at[problem.width, pl.ds(0, MAILBOX_WORDS)]
    token_bytes = problem.quantizer.k
    if _sends(problem):

        @pl.when(warpgroup == 0)
        def _():
            open_mailbox(mailbox)
            rank = lax.axis_index("rank")
            of_others = problem.m - lax.div(problem.m - rank + blocks - 1, blocks)
            expect_mail(mailbox, of_others * (token_bytes + 4 * RECORD_WORDS))

        arrive_at_cluster()
        await_cluster()  # all mailboxes are open
    if vectors:
        plgpu.barrier_wait(refs["vectors_arrived"])

    def quantize(index) -> None:
        token = _token(problem, index)

        @pl.when((index < own) & (token < problem.m))
        def _():
            plgpu.barrier_wait(refs["floats_arrived"].at[index])
            scratch = refs["quantizer_scratch"].at[warpgroup]
            _quantize_token(problem, token, slots.at[index], scratch, x_ring, records, *vectors)
            if _sends(problem):
                sections = [
                    Section(0, token * (problem.token_rows * BYTES_PER_ROW), token_bytes, True),
                    Section(1, token * (4 * RECORD_WORDS), 4 * RECORD_WORDS, True),
                ]
                send_mail(mailbox, [x_ring, records], sections, jnp.bool_(True), blocks)

    if own <= tiling.warpgroups:
        quantize(warpgroup)
    else:
        pl.loop(0, -(-own // tiling.warpgroups))(lambda turn: quantize(turn * tiling.warpgroups + warpgroup))
    plgpu.barrier_arrive(refs["quantized"])
    plgpu.barrier_wait(refs["quantized"])
    if _sends(problem):
        await_mail(mailbox, jnp.int32(0))
        arrive_at_cluster()


def _quantize_token_twin(problem: FewTokensProblem, token, x, scratch, tokens, records, *vectors):
    packed, (scale, zero_code, code_sum) = quantized_slot(problem.quantizer, x, vectors)
    rows = packed[0, 0].reshape(-1, WORDS_PER_ROW)
    tokens[token, pl.ds(0, rows.shape[0])] = rows
    records[token] = jnp.stack([code_sum[0], zero_code[0], lax.bitcast_convert_type(scale[0], jnp.int32), jnp.int32(0)])


@with_twin(_quantize_token_twin)
def _quantize_token(problem: FewTokensProblem, token: Int[Array, ""], *refs) -> None:
    """Quantizes a token from its slot to the rows of `x_ring` and its record; called by one warpgroup."""

    @plgpu.inline_mgpu(arg_types=(SPLAT, *[plgpu.RefType()] * len(refs)))
    def inline(_, token, *refs):
        quantize_token(problem, scalar_of(token), *refs)

    inline(jnp.int32(token), *refs)


def quantize_token(problem: FewTokensProblem, token: Value, x, scratch, tokens, records, *vectors) -> None:
    """What threads do in `_quantize_token`.

    Args:
      problem: the static side.
      token: its index.
      x: [1, columns] in shared memory, as `RowQuantizer.quantize` takes it.
      scratch: int32 [SCRATCH_WORDS] in shared memory, private to the warpgroup.
      tokens: uint32 [m or more, token_rows, 32] in shared memory, swizzled.
      records: int32 [width or more, RECORD_WORDS] in shared memory.
      *vectors: the prologue's, in shared memory.
    """
    quantizer = problem.quantizer
    row = RowThreads(problem.m, quantizer.blocks, quantizer.threads, token, scratch)
    quantizer.quantize_row(row, x, vectors, _TokenInSharedMemory(problem, token, tokens, records))


class _TokenInSharedMemory:
    """A `RowTarget`: a token's swizzled rows, and its record."""

    def __init__(self, problem: FewTokensProblem, token: Value, tokens, records):
        self._first_row = ptx.times(token, problem.token_rows)
        self._tokens = ptx.pointer(tokens, SHARED)
        self._record = ptx.advance(ptx.pointer(records, SHARED), ptx.times(token, 4 * RECORD_WORDS))

    def store_grid(self, scale: Value, zero_code: Value) -> None:
        with ptx.when(ptx.equal(thread_index(), 0)):
            ptx.store(ptx.advance(self._record, 4), [zero_code])
            ptx.store(ptx.advance(self._record, 8), [scale])

    def store_code_sum(self, total: Value) -> None:
        with ptx.when(ptx.equal(thread_index(), 0)):
            ptx.store(self._record, [total])

    def store_bytes(self, position: Value, packed: list[Value], limit: int | None) -> None:
        row = ptx.plus(self._first_row, ptx.shift_right(position, _BLOCKS_OF_ROW.bit_length() - 1))
        start = ptx.advance(self._tokens, ptx.times(row, BYTES_PER_ROW))
        segment = ptx.times(ptx.bits_of(position, _BLOCKS_OF_ROW - 1), 2)
        in_swizzle = ptx.bits_of(row, _ROWS_OF_SWIZZLE - 1)

        def store() -> None:
            for half in range(2):
                moved = ptx.flip_bits(ptx.plus(segment, half), in_swizzle)
                ptx.store(ptx.advance(start, ptx.times(moved, _SEGMENT)), packed[4 * half : 4 * half + 4])

        if limit is None:
            store()
        else:
            with ptx.when(ptx.less(position, limit)):
                store()

    def store_planes(self, position: Value, planes: list[Value], limit: int | None) -> None:
        raise AssertionError("tokens are quantized to bytes")


def _take_records_twin(problem: FewTokensProblem, records, targets):
    token = jnp.minimum(jnp.arange(problem.width, dtype=jnp.int32), problem.m - 1)
    words = records[...][token]
    targets.code_sums[...], targets.zero_code[...] = words[:, 0], words[:, 1]
    targets.scale[...] = lax.bitcast_convert_type(words[:, 2], jnp.float32)


@with_twin(_take_records_twin)
def take_records(problem: FewTokensProblem, records: Any, targets: TokenTerms) -> None:
    """Copies the terms of the tokens to arrays of [width], from one warpgroup; beyond m those of the last token."""

    @plgpu.inline_mgpu(arg_types=tuple([plgpu.RefType()] * 4))
    def inline(_, records, *targets):
        thread = thread_index()
        with ptx.when(ptx.less(thread, problem.width)):
            token = ptx.smaller(thread, problem.m - 1)
            words = ptx.load(ptx.advance(ptx.pointer(records, SHARED), ptx.times(token, 4 * RECORD_WORDS)), 4)
            for target, word in zip(targets, words, strict=False):
                ptx.store(ptx.advance(ptx.pointer(target, SHARED), ptx.times(thread, 4)), [word])

    inline(records, targets.code_sums, targets.zero_code, targets.scale)

"""Activations to packed operands in one pass over memory: quantize, pack, and sum the codes.

Persistent blocks, one a multiprocessor. Each warpgroup of a block takes rows independently of the others: TMA loads
them into the warpgroup's own ring of slots, so that the next rows arrive while it works on one, and it stores words
straight from registers. Of few rows every block has one, whose threads load it themselves. `quantizer` is what the
threads do with a slot.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Prologue, rotation_of
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up, vector_length
from bipolar_jax.kernels.sm90.core.bit_transpose import CodeWords
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel, with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of
from bipolar_jax.kernels.sm90.core.hardware import (
    ALIGNED_WORDS,
    MULTIPROCESSORS,
    PTX_TYPES,
    SHARED_MEMORY_BYTES,
    WARP,
    WARPGROUP,
)
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.quantize_rows.quantizer import RowQuantizer
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK, SCRATCH_WORDS
from bipolar_jax.kernels.sm90.quantize_rows.twin import quantize_slot_twin
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing.words import WORD_BITS, num_words

_WARPGROUPS, _BARRIERS = 4, 32  # at most, in a block
_LEAST_THREADS = 8  # that share a row
# Barriers and scratch take 1 KiB less than the reserve, so that four rows of 28672 16-bit numbers fit.
_MEMORY_BYTES = SHARED_MEMORY_BYTES + 1024
_COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,  # `quantizer` has the barriers it needs
)
_COPY_BYTES = 128  # Mosaic's copies to shared memory must be multiples of this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Quantized activations as operands of the tensor cores.

    Vectors have a multiple of 4 elements; those beyond m are undefined.

    Attributes:
      words: operand "planes": bit b of words[i, row, w] is bit i of the code of element 32 w + b; rows are whole
        multiples of 16 bytes. Operand "int8": one plane of signed codes u - code_offset, four to a word: byte t of
        words[0, row, 8 B + j] is element 32 B + 8 t + j. Zero beyond the last element.
      scale: float32, as `quantize_tokens`.
      zero_code: the code of zero; 0 for one bit, whose grid has no zero.
      code_sums: sums of the unsigned codes u.
    """

    words: UInt32[Array, "planes m words"]
    scale: Float[Array, " m_filled"]
    zero_code: Int[Array, " m_filled"]
    code_sums: Int[Array, " m_filled"]


def quantize_and_pack(
    x: Float[Array, "m columns"],
    a_format: BipolarFormat,
    operand: OperandKind,
    *,
    prologue: Prologue | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> PackedTokens:
    """The numbers of jitted `quantize_tokens`, packed.

    Args:
      x: bfloat16, float16 or float32; k numbers a row, or the prologue's inputs of k numbers. Copied if k is not a
        multiple of 32 (64, for some shapes).
      a_format: 1 to 8 bits, not ternary.
      operand: the kind of words, see `PackedTokens`.
      prologue: applied to x first, in float32; its sums are in another order than XLA's. XLA computes one that rotates
        blocks that are not within a warp (`Hadamard.within_warp`).
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: another dtype, format or operand, or vectors of another length.
      Unsupported: a row does not fit the shared memory.
    """
    rotation = rotation_of(prologue)
    if rotation is not None and not rotation.within_warp:
        x, prologue = prologue(x), None
    quantizer, inputs = plan(x, a_format, operand, prologue)
    # A jit of its own is lowered once: XLA can then merge the calls of layers that share x.
    launch = _launch if interpret else jax.jit(_launch, static_argnums=(0, 2, 3))
    return PackedTokens(*launch(quantizer, inputs, blocks, interpret))


def plan(
    x: Float[Array, "m columns"], a_format: BipolarFormat, operand: OperandKind, prologue: Prologue | None
) -> tuple[RowQuantizer, list[Array]]:
    """The quantizer, and the kernel's inputs: x and the prologue's vectors, filled up to whole blocks and copies.

    A rotation of the prologue is within a warp.
    """
    m, columns = x.shape
    vectors = jax.tree.leaves(prologue)
    dtypes = [array.dtype.name for array in (x, *vectors)]
    if not PTX_TYPES.keys() >= set(dtypes):
        raise ValueError(f"x and the prologue must be bfloat16, float16 or float32, got {', '.join(dtypes)}")
    if a_format.ternary or operand not in ("planes", "int8"):
        raise ValueError(f'activations are packed as "planes" or "int8" of 1 to 8 bits, got {operand!r}, {a_format}')
    parts = 1 if prologue is None else prologue.parts
    k, rotation = columns // parts, rotation_of(prologue)
    if rotation is not None and rotation.size != k:
        raise ValueError(f"x of shape {x.shape} does not fit a prologue that rotates {rotation.size} numbers")
    if columns % parts or any(vector.shape != (k,) for vector in vectors):
        raise ValueError(
            f"x of shape {x.shape} does not fit the prologue of {parts} parts and vectors of shapes "
            f"{[vector.shape for vector in vectors]}: these must be {(k,)}"
        )
    threads = _threads_of_row(m, k, columns * x.dtype.itemsize)
    quantizer = RowQuantizer(
        m=m,
        k=k,
        ptx_type=PTX_TYPES[x.dtype.name],
        prologue=jax.tree.map(lambda vector: PTX_TYPES[vector.dtype.name], prologue),
        code_words=CodeWords(a_format, signed=operand == "int8"),
        row_words=-(-k // (ALIGNED_WORDS * WORD_BITS)) * ALIGNED_WORDS if operand == "planes" else 8 * num_words(k),
        threads=threads,
        in_memory=threads == WARPGROUP and m <= MULTIPROCESSORS and parts == 1,
    )
    whole_copies = _COPY_BYTES * threads // WARPGROUP // x.dtype.itemsize
    filled = fill_up(x.reshape(m, parts, k), BLOCK).reshape(m, -1)
    inputs = [fill_up(filled, max(BLOCK, whole_copies))]
    inputs += [fill_up(vector, max(BLOCK, _COPY_BYTES // vector.dtype.itemsize)) for vector in vectors]
    return quantizer, inputs


def _threads_of_row(m: int, k: int, row_bytes: int) -> int:
    """How many threads share a row.

    Fewer threads spend less on the reductions and stores that each row needs once. More finish few or long rows sooner,
    and need a smaller slot.
    """
    for threads, most_bytes in ((_LEAST_THREADS, 2048), (WARP, 12288)):
        if row_bytes <= most_bytes and m * threads >= WARPGROUP * MULTIPROCESSORS:
            return threads
    return WARP if k <= WARP * BLOCK else WARPGROUP


def _launch(quantizer: RowQuantizer, inputs: list[Array], blocks: int, interpret) -> list[Array]:
    """Runs the kernel; returns the fields of `PackedTokens`."""
    if not quantizer.in_memory:
        return _launch_rows_in_slots(quantizer, inputs, blocks, interpret)
    # As many numbers as of many rows: `check_row` does not know how many there are.
    _share_memory(inputs[0].shape[1] * inputs[0].dtype.itemsize, sum(vector.nbytes for vector in inputs[1:]))
    return _launch_rows_in_memory(quantizer, inputs, blocks, interpret)


def _launch_rows_in_memory(quantizer: RowQuantizer, inputs: list[Array], blocks: int, interpret) -> list[Array]:
    """`_launch` of a row a block, or a few: nothing would arrive while another row is worked on."""
    m = quantizer.m
    blocks = min(blocks, m)

    def kernel(x, *refs, scratch):
        vectors, outputs = refs[: len(inputs) - 1], refs[len(inputs) - 1 :]

        def quantize(row):
            _quantize_slot(quantizer, row, x.at[pl.ds(row, 1)], scratch, *outputs, *vectors)

        first = lax.axis_index("block")
        if blocks == m:
            quantize(first)
        else:
            pl.loop(0, lax.div(m - first + blocks - 1, blocks))(lambda turn: quantize(first + turn * blocks))

    return launch_kernel(
        kernel,
        out_type=_out_type(quantizer),
        scratch_types=dict(scratch=plgpu.SMEM((SCRATCH_WORDS,), jnp.int32)),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="quantize_rows",
        interpret=interpret,
        compiler_params=_COMPILER_PARAMS,
    )(*inputs)


def _launch_rows_in_slots(quantizer: RowQuantizer, inputs: list[Array], blocks: int, interpret) -> list[Array]:
    """`_launch` of many rows."""
    m, rows, columns = quantizer.m, quantizer.rows, inputs[0].shape[1]
    vector_bytes = sum(vector.nbytes for vector in inputs[1:])
    warpgroups, slots = _share_memory(rows * columns * inputs[0].dtype.itemsize, vector_bytes)
    steps = pl.cdiv(m, rows)
    blocks = min(blocks, steps)
    # Of few rows no more than have any: threads and barriers take time to start.
    warpgroups = min(warpgroups, pl.cdiv(steps, blocks))
    workers = warpgroups * blocks
    slots = min(slots, pl.cdiv(steps, workers))
    # In these modes a copy is one bulk copy of bytes, without the size limits of TMA's boxes.
    in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    last_slot = plgpu.OOBFillMode.UNDEFINED if m % rows else in_bounds

    def kernel(*refs):
        x, *vectors = refs[: len(inputs)]
        outputs = refs[len(inputs) : len(inputs) + 4]
        ring, scratch, arrived, *vector_slots = refs[len(inputs) + 4 :]
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        worker = warpgroup * blocks + block  # consecutive rows go to different multiprocessors

        def first_row(turn):
            return (worker + turn * workers) * rows

        def load(turn):
            slot = lax.rem(turn, slots)
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(first_row(turn), rows)],
                ring.at[warpgroup, slot],
                arrived.at[warpgroup * slots + slot],
                oob_mode=last_slot,
            )

        turns = lax.div(steps - worker + workers - 1, workers)
        for turn in range(slots):
            when(turn < turns)(functools.partial(load, turn))
        vector_slots, arrivals = vector_slots[: len(vectors)], vector_slots[len(vectors) :]

        @when(warpgroup == 0)
        def _():
            for vector, vector_slot, arrival in zip(vectors, vector_slots, arrivals, strict=True):
                plgpu.copy_gmem_to_smem(vector, vector_slot, arrival, oob_mode=in_bounds)

        for arrival in arrivals:
            plgpu.barrier_wait(arrival)

        @pl.loop(0, turns)
        def _(turn):
            slot = lax.rem(turn, slots)
            plgpu.barrier_wait(arrived.at[warpgroup * slots + slot])
            operands = (ring.at[warpgroup, slot], scratch.at[warpgroup], *outputs, *vector_slots)
            _quantize_slot(quantizer, first_row(turn), *operands)
            when(turn + slots < turns)(functools.partial(load, turn + slots))

    scratch_types = [
        plgpu.SMEM((warpgroups, slots, rows, columns), inputs[0].dtype),
        plgpu.SMEM((warpgroups, SCRATCH_WORDS), jnp.int32),
        plgpu.Barrier(num_barriers=warpgroups * slots),
    ]
    scratch_types += [plgpu.SMEM(vector.shape, vector.dtype) for vector in inputs[1:]]
    scratch_types += [plgpu.Barrier() for _ in inputs[1:]]
    return launch_kernel(
        kernel,
        out_type=_out_type(quantizer),
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="quantize_rows",
        interpret=interpret,
        compiler_params=_COMPILER_PARAMS,
    )(*inputs)


def _out_type(quantizer: RowQuantizer) -> list[jax.ShapeDtypeStruct]:
    """The fields of `PackedTokens`."""
    vectors = [jax.ShapeDtypeStruct((vector_length(quantizer.m),), dtype) for dtype in (jnp.float32, *[jnp.int32] * 2)]
    return [jax.ShapeDtypeStruct((quantizer.planes, quantizer.m, quantizer.row_words), jnp.uint32), *vectors]


def check_row(k: int, dtype: jnp.dtype) -> None:
    """Raises Unsupported if a row of k numbers does not fit the shared memory."""
    columns = -(-k // (_COPY_BYTES // 2)) * (_COPY_BYTES // 2)
    _share_memory(columns * jnp.dtype(dtype).itemsize, 0)


def _share_memory(slot_bytes: int, vector_bytes: int) -> tuple[int, int]:
    """Warpgroups of a block, and slots for each."""
    fit = (_MEMORY_BYTES - vector_bytes) // slot_bytes
    if fit < 1:
        raise Unsupported(f"a row takes {slot_bytes + vector_bytes} bytes, more than {_MEMORY_BYTES} of shared memory")
    # With two slots a warpgroup works on one while the other fills. Where rows are too long for that, other warpgroups
    # work while one waits.
    if fit < 6:
        return min(fit, _WARPGROUPS), 1
    warpgroups = min(fit // 2, _WARPGROUPS)
    return warpgroups, min(fit, _BARRIERS) // warpgroups


@with_twin(quantize_slot_twin)
def _quantize_slot(quantizer: RowQuantizer, first_row: Int[Array, ""], *refs) -> None:
    """`RowQuantizer.quantize` on refs."""

    @plgpu.inline_mgpu(arg_types=(SPLAT, *[plgpu.RefType()] * len(refs)))
    def inline(_, first_row, *refs):
        quantizer.quantize(scalar_of(first_row), *refs)

    inline(first_row, *refs)

"""Activations to packed operands in one pass over memory: quantize, pack, and sum the codes.

Persistent blocks, one a multiprocessor. Each of a block's warpgroups takes rows by itself: they
arrive by TMA in a ring of slots of its own, so that the next rows are under way while it works
on one, and leave as words from registers. `row_quantizer` has what the threads do.
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
from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up, vector_length
from bipolar_jax.kernels.sm90.core.bit_transpose import CodeWords
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, PTX_TYPES, SHARED_MEMORY_BYTES, WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.quantize_rows.emulate import emulate
from bipolar_jax.kernels.sm90.quantize_rows.quantizer import RowQuantizer
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK, SCRATCH_WORDS
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing.words import WORD_BITS, num_words

_WARPGROUPS, _BARRIERS = 4, 32  # at most
_FEW = 8  # threads, at least, for a row
_COPY_BYTES = 128  # that Mosaic's copies to shared memory must be a multiple of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Activations as the tensor cores take them.

    Vectors have a multiple of 4 elements; what is in those beyond m is not defined.

    Attributes:
      words: operand "planes": bit b of words[i, row, w] is bit i of the code of element
        32 w + b; rows are whole multiples of 16 bytes. Operand "int8": one plane of signed
        codes u - code_offset, four to a word: byte t of words[0, row, 8 B + j] is element
        32 B + 8 t + j. Zero where the elements have ended.
      scale: float32, as `quantize_tokens`.
      zero_code: the code that zero has; 0 for one bit, whose grid has no zero.
      code_sums: of the unsigned codes u.
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
    """The numbers of `quantize_tokens`, as it is when jitted, in packed form.

    Args:
      x: bfloat16, float16 or float32; k numbers a row, or as many as the prologue makes k of.
        A copy is made where k is no multiple of 32 (64, for some shapes).
      a_format: 1 to 8 bits, not ternary.
      operand: what the words are, see `PackedTokens`.
      prologue: what is done to x first, in float32, but sums in an order of their own.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: another dtype, format or operand, or vectors of another length.
      Unsupported: a row does not fit the shared memory.
    """
    quantizer, inputs = plan(x, a_format, operand, prologue)
    # Jitted by itself it is lowered once: XLA then sees that layers which share x do the same, and does it once.
    launch = _launch if interpret else jax.jit(_launch, static_argnums=(0, 2, 3))
    return PackedTokens(*launch(quantizer, inputs, blocks, interpret))


def plan(
    x: Float[Array, "m columns"], a_format: BipolarFormat, operand: OperandKind, prologue: Prologue | None
) -> tuple[RowQuantizer, list[Array]]:
    """What the warpgroups do, and the inputs as they take them: x, and the prologue's vectors."""
    m, columns = x.shape
    vectors = jax.tree.leaves(prologue)
    dtypes = [array.dtype.name for array in (x, *vectors)]
    if not PTX_TYPES.keys() >= set(dtypes):
        raise ValueError(f"x and the prologue must be bfloat16, float16 or float32, got {', '.join(dtypes)}")
    if a_format.ternary or operand not in ("planes", "int8"):
        raise ValueError(f'activations are packed as "planes" or "int8" of 1 to 8 bits, got {operand!r}, {a_format}')
    parts = 1 if prologue is None else prologue.parts
    k = columns // parts
    if columns % parts or any(vector.shape != (k,) for vector in vectors):
        raise ValueError(
            f"x of shape {x.shape} does not fit the prologue of {parts} parts and vectors of shapes "
            f"{[vector.shape for vector in vectors]}: these must be {(k,)}"
        )
    threads = _threads_of_row(m, k, columns * x.dtype.itemsize)
    quantizer = RowQuantizer(
        m=m,
        k=k,
        number=PTX_TYPES[x.dtype.name],
        prologue=jax.tree.map(lambda vector: PTX_TYPES[vector.dtype.name], prologue),
        code_words=CodeWords(a_format, signed=operand == "int8"),
        row_words=-(-k // (4 * WORD_BITS)) * 4 if operand == "planes" else 8 * num_words(k),
        threads=threads,
    )
    whole_copies = _COPY_BYTES * threads // WARPGROUP // x.dtype.itemsize
    filled = fill_up(x.reshape(m, parts, k), BLOCK).reshape(m, -1)
    inputs = [fill_up(filled, max(BLOCK, whole_copies))]
    inputs += [fill_up(vector, max(BLOCK, _COPY_BYTES // vector.dtype.itemsize)) for vector in vectors]
    return quantizer, inputs


def _threads_of_row(m: int, k: int, row_bytes: int) -> int:
    """How many threads share a row.

    The fewer, the less is spent on what is done once a row; the more, the sooner few or long
    rows are finished, and the less memory a slot takes. Measured on an H200 with bfloat16 and
    one bit: 65536 x 576 takes 23 us with 8 threads and 31 with 32; 8192 x 6144 takes 28 us with
    32 threads and 30 with 128, 8192 x 8192 takes 38 and 37.
    """
    for threads, most_bytes in ((_FEW, 2048), (WARP, 12288)):
        if row_bytes <= most_bytes and m * threads >= WARPGROUP * MULTIPROCESSORS:
            return threads
    return WARP if k <= WARP * BLOCK else WARPGROUP


def _launch(quantizer: RowQuantizer, inputs: list[Array], blocks: int, interpret) -> list[Array]:
    """Runs the kernel; returns the fields of `PackedTokens`."""
    m, rows, columns = quantizer.m, quantizer.rows, inputs[0].shape[1]
    vector_bytes = sum(vector.nbytes for vector in inputs[1:])
    warpgroups, slots = _share_memory(rows * columns * inputs[0].dtype.itemsize, vector_bytes)
    steps = pl.cdiv(m, rows)
    blocks = min(blocks, steps)
    workers = warpgroups * blocks
    # With any mode but zeros it is one copy of bytes, free of the limits of TMA's boxes.
    in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    last_slot = plgpu.OOBFillMode.UNDEFINED if m % rows else in_bounds

    def kernel(*refs):
        x, *vectors = refs[: len(inputs)]
        outputs = refs[len(inputs) : len(inputs) + 4]
        ring, scratch, arrived, *vector_slots = refs[len(inputs) + 4 :]
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        worker = warpgroup * blocks + block  # few rows go to different multiprocessors

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
            pl.when(turn < turns)(functools.partial(load, turn))
        vector_slots, arrivals = vector_slots[: len(vectors)], vector_slots[len(vectors) :]

        @pl.when(warpgroup == 0)
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
            (_quantize if interpret is None else emulate)(quantizer, first_row(turn), *operands)
            pl.when(turn + slots < turns)(functools.partial(load, turn + slots))

    scratch_types = [
        plgpu.SMEM((warpgroups, slots, rows, columns), inputs[0].dtype),
        plgpu.SMEM((warpgroups, SCRATCH_WORDS), jnp.int32),
        plgpu.Barrier(num_barriers=warpgroups * slots),
    ]
    scratch_types += [plgpu.SMEM(vector.shape, vector.dtype) for vector in inputs[1:]]
    scratch_types += [plgpu.Barrier() for _ in inputs[1:]]
    return launch_kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((quantizer.planes, m, quantizer.row_words), jnp.uint32),
            *[jax.ShapeDtypeStruct((vector_length(m),), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)],
        ],
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="quantize_rows",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # `row_quantizer` has those that are needed
        ),
    )(*inputs)


def check_row(k: int, dtype: jnp.dtype) -> None:
    """Raises Unsupported if a row of k numbers does not fit the shared memory."""
    columns = -(-k // (_COPY_BYTES // 2)) * (_COPY_BYTES // 2)
    _share_memory(columns * jnp.dtype(dtype).itemsize, 0)


def _share_memory(slot_bytes: int, vector_bytes: int) -> tuple[int, int]:
    """Warpgroups of a block, and slots for each."""
    fit = (SHARED_MEMORY_BYTES - vector_bytes) // slot_bytes
    if fit < 1:
        raise Unsupported(
            f"a row takes {slot_bytes + vector_bytes} bytes, more than {SHARED_MEMORY_BYTES} of shared memory"
        )
    # With two slots a warpgroup works on one while the other fills; where rows are too long for
    # that, others work while one waits.
    if fit < 6:
        return min(fit, _WARPGROUPS), 1
    warpgroups = min(fit // 2, _WARPGROUPS)
    return warpgroups, min(fit, _BARRIERS) // warpgroups


def _quantize(quantizer: RowQuantizer, first_row: Int[Array, ""], *refs) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)))
    def inline(_, first_row, *refs):
        quantizer.quantize(first_row.registers.item(), *refs)

    inline(first_row, *refs)

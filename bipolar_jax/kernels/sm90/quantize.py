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
from bipolar_jax.kernels.sm90.bit_packing import CodeWords
from bipolar_jax.kernels.sm90.operand_words import fill_up
from bipolar_jax.kernels.sm90.row_emulation import emulate
from bipolar_jax.kernels.sm90.row_quantizer import SCRATCH_WORDS, RowQuantizer
from bipolar_jax.kernels.sm90.row_threads import BLOCK, WARP, WARPGROUP
from bipolar_jax.kernels.sm90.tensor_core import OperandKind
from bipolar_jax.kernels.sm90.tiling import MULTIPROCESSORS
from bipolar_jax.packing.words import WORD_BITS, num_words

_MEMORY = 216 * 1024  # bytes of shared memory for slots and gain, of the 227 KiB that a block may have
_WARPGROUPS, _BARRIERS = 4, 32  # at most
_FEW = 8  # threads, at least, for a row
_COPY_BYTES = 128  # that Mosaic's copies to shared memory must be a multiple of
_VECTOR_UNIT = 4  # tokens: 16 bytes, as what reads the vectors wants them
_NUMBERS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x * rsqrt(mean(x^2) + eps) * gain, in float32, before x is quantized."""

    gain: Float[Array, " k"]
    eps: float = dataclasses.field(metadata={"static": True})


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
    x: Float[Array, "m k"],
    a_format: BipolarFormat,
    operand: OperandKind,
    *,
    norm: RMSNorm | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> PackedTokens:
    """The numbers of `quantize_tokens`, as it is when jitted, in packed form.

    Args:
      x: bfloat16, float16 or float32. A copy is made where k is no multiple of 32 (64, for
        some shapes).
      a_format: 1 to 8 bits, not ternary.
      operand: what the words are, see `PackedTokens`.
      norm: normalizes x first, in float32, but in an order of its own.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: another dtype, format or operand, or a gain of another length.
      NotImplementedError: a row does not fit the shared memory.
    """
    quantizer, inputs = plan(x, a_format, operand, norm)
    return PackedTokens(*_launch(quantizer, inputs, blocks, interpret))


def plan(
    x: Float[Array, "m k"], a_format: BipolarFormat, operand: OperandKind, norm: RMSNorm | None
) -> tuple[RowQuantizer, list[Array]]:
    """What the warpgroups do, and the inputs as they take them: x, and the gain if there is one."""
    m, k = x.shape
    dtypes = [x.dtype.name] if norm is None else [x.dtype.name, norm.gain.dtype.name]
    if not _NUMBERS.keys() >= set(dtypes):
        raise ValueError(f"x and the gain must be bfloat16, float16 or float32, got {', '.join(dtypes)}")
    if a_format.ternary or operand not in ("planes", "int8"):
        raise ValueError(f'activations are packed as "planes" or "int8" of 1 to 8 bits, got {operand!r}, {a_format}')
    if norm is not None and norm.gain.shape != (k,):
        raise ValueError(f"the gain must have shape {(k,)} for x of shape {x.shape}, got {norm.gain.shape}")
    threads = _threads_of_row(m, k, x.dtype.itemsize)
    inputs = [fill_up(x, max(BLOCK, _COPY_BYTES * threads // WARPGROUP // x.dtype.itemsize))]
    if norm is not None:
        inputs.append(fill_up(norm.gain, max(BLOCK, _COPY_BYTES // norm.gain.dtype.itemsize)))
    quantizer = RowQuantizer(
        m=m,
        k=k,
        number=_NUMBERS[x.dtype.name],
        gain_number=None if norm is None else _NUMBERS[norm.gain.dtype.name],
        eps=0.0 if norm is None else norm.eps,
        code_words=CodeWords(a_format, signed=operand == "int8"),
        row_words=-(-k // (4 * WORD_BITS)) * 4 if operand == "planes" else 8 * num_words(k),
        threads=threads,
    )
    return quantizer, inputs


def _threads_of_row(m: int, k: int, itemsize: int) -> int:
    """How many threads share a row.

    The fewer, the less is spent on what is done once a row; the more, the sooner few or long
    rows are finished, and the less memory a slot takes. Measured on an H200 with bfloat16 and
    one bit: 65536 x 576 takes 23 us with 8 threads and 31 with 32; 8192 x 6144 takes 28 us with
    32 threads and 30 with 128, 8192 x 8192 takes 38 and 37.
    """
    for threads, row_bytes in ((_FEW, 2048), (WARP, 12288)):
        if k * itemsize <= row_bytes and m * threads >= WARPGROUP * MULTIPROCESSORS:
            return threads
    return WARP if k <= WARP * BLOCK else WARPGROUP


def _launch(quantizer: RowQuantizer, inputs: list[Array], blocks: int, interpret) -> list[Array]:
    """Runs the kernel; returns the fields of `PackedTokens`."""
    m, rows, columns = quantizer.m, quantizer.rows, inputs[0].shape[1]
    gain_bytes = sum(gain.size * gain.dtype.itemsize for gain in inputs[1:])
    warpgroups, slots = _share_memory(rows * columns * inputs[0].dtype.itemsize, gain_bytes)
    steps = pl.cdiv(m, rows)
    blocks = min(blocks, steps)
    workers = warpgroups * blocks
    # With any mode but zeros it is one copy of bytes, free of the limits of TMA's boxes.
    in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    last_slot = plgpu.OOBFillMode.UNDEFINED if m % rows else in_bounds

    def kernel(*refs):
        x, *gain = refs[: len(inputs)]
        outputs = refs[len(inputs) : len(inputs) + 4]
        ring, scratch, arrived, *gain_slot = refs[len(inputs) + 4 :]
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
        if gain:

            @pl.when(warpgroup == 0)
            def _():
                plgpu.copy_gmem_to_smem(*gain, *gain_slot, oob_mode=in_bounds)

            plgpu.barrier_wait(gain_slot[1])

        @pl.loop(0, turns)
        def _(turn):
            slot = lax.rem(turn, slots)
            plgpu.barrier_wait(arrived.at[warpgroup * slots + slot])
            operands = (ring.at[warpgroup, slot], scratch.at[warpgroup], *outputs, *gain_slot[:1])
            (_quantize if interpret is None else emulate)(quantizer, first_row(turn), *operands)
            pl.when(turn + slots < turns)(functools.partial(load, turn + slots))

    scratch_types = [
        plgpu.SMEM((warpgroups, slots, rows, columns), inputs[0].dtype),
        plgpu.SMEM((warpgroups, SCRATCH_WORDS), jnp.int32),
        plgpu.Barrier(num_barriers=warpgroups * slots),
    ]
    for gain in inputs[1:]:
        scratch_types += [plgpu.SMEM(gain.shape, gain.dtype), plgpu.Barrier()]
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((quantizer.planes, m, quantizer.row_words), jnp.uint32),
            *[jax.ShapeDtypeStruct((_filled(m),), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)],
        ],
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # `row_quantizer` has those that are needed
        ),
    )(*inputs)


def _filled(m: int) -> int:
    """Length of vectors over m tokens."""
    return -(-m // _VECTOR_UNIT) * _VECTOR_UNIT


def check_row(k: int, dtype: jnp.dtype) -> None:
    """Raises NotImplementedError if a row of k numbers does not fit the shared memory."""
    columns = -(-k // (_COPY_BYTES // 2)) * (_COPY_BYTES // 2)
    _share_memory(columns * jnp.dtype(dtype).itemsize, 0)


def _share_memory(slot_bytes: int, gain_bytes: int) -> tuple[int, int]:
    """Warpgroups of a block, and slots for each."""
    fit = (_MEMORY - gain_bytes) // slot_bytes
    if fit < 1:
        raise NotImplementedError(f"a row takes {slot_bytes + gain_bytes} bytes, more than {_MEMORY} of shared memory")
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

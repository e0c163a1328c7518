"""Activations to packed operands in one pass over memory: quantize, pack, and sum the codes.

Persistent blocks, one a multiprocessor. Each of a block's warpgroups takes rows by itself: they
arrive by TMA in a ring of slots of its own, so that the next rows are under way while it
quantizes one, and leave as words from registers. `row_quantizer` has what a thread computes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.activations import quantize_tokens
from bipolar_jax.kernels.sm90.bit_packing import CodeWords
from bipolar_jax.kernels.sm90.row_quantizer import SCRATCH_WORDS, RowQuantizer
from bipolar_jax.kernels.sm90.row_threads import BLOCK, WARP, WARPGROUP
from bipolar_jax.packing.words import WORD_BITS, num_words

MULTIPROCESSORS = 132
_SLOT_BUDGET = 216 * 1024  # bytes of shared memory for slots and gain, of the 227 KiB that a block may have
_COPY_BYTES = 128
_MAX_WARPGROUPS, _MAX_BARRIERS = 4, 32
_WARP_ROW_LIMIT = 2048  # up to so many numbers a warp takes a row by itself
_NUMBERS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

Operand = Literal["planes", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x * rsqrt(mean(x^2) + eps) * gain, in float32, before x is quantized."""

    gain: Float[Array, " k"]
    eps: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Activations as the tensor cores take them; zeros in the words from k on.

    Attributes:
      words: operand "planes": bit b of words[i, row, w] is bit i of the code of element
        32 w + b; rows are filled up to 16 bytes. Operand "int8": one plane of signed codes,
        four to a word: byte t of words[0, row, 8 B + j] is element 32 B + 8 t + j.
      scale: float32, as `quantize_tokens`.
      zero_code: the code that zero has; 0 for one bit, which has no zero.
      code_sums: of the unsigned codes.
    """

    words: UInt32[Array, "planes m words"]
    scale: Float[Array, " m"]
    zero_code: Int[Array, " m"]
    code_sums: Int[Array, " m"]


def quantize_and_pack(
    x: Float[Array, "m k"],
    a_format: BipolarFormat,
    operand: Operand,
    *,
    norm: RMSNorm | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> PackedTokens:
    """The numbers of `quantize_tokens`, packed.

    Args:
      x: bfloat16, float16 or float32. A copy is made of it where k is no multiple of 32.
      a_format: 1 to 8 bits, not ternary.
      operand: what the words are, see `PackedTokens`.
      norm: normalizes x first.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: a dtype, format or operand other than these, or a gain of another length.
      NotImplementedError: a row does not fit the shared memory.
    """
    m, k = x.shape
    if x.dtype.name not in _NUMBERS or (norm is not None and norm.gain.dtype.name not in _NUMBERS):
        raise ValueError(f"x and the gain must be bfloat16, float16 or float32, got {x.dtype}, {norm}")
    if a_format.ternary or operand not in ("planes", "int8"):
        raise ValueError(f'activations are packed as "planes" or "int8" of 1 to 8 bits, got {operand!r}, {a_format}')
    if norm is not None and norm.gain.shape != (k,):
        raise ValueError(f"the gain must have shape {(k,)} for x of shape {x.shape}, got {norm.gain.shape}")

    threads = WARP if k <= _WARP_ROW_LIMIT else WARPGROUP
    # Whole blocks; and what is copied at a time must be a multiple of 128 bytes.
    inputs = [_fill_up(x, max(BLOCK, _COPY_BYTES * threads // WARPGROUP // x.dtype.itemsize))]
    if norm is not None:
        inputs.append(_fill_up(norm.gain, max(BLOCK, _COPY_BYTES // norm.gain.dtype.itemsize)))
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
    planes = a_format.bits if operand == "planes" else 1
    return PackedTokens(*_launch(quantizer, planes, inputs, blocks, interpret))


def _fill_up(array: Array, multiple: int) -> Array:
    """Zeros after the last axis, if need be."""
    filler = -array.shape[-1] % multiple
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, filler)]) if filler else array


def _launch(quantizer: RowQuantizer, planes: int, inputs: list[Array], blocks: int, interpret) -> list[Array]:
    """Runs the kernel; returns the fields of `PackedTokens`."""
    m, rows, columns = quantizer.m, quantizer.rows, inputs[0].shape[1]
    warpgroups, slots = _share_memory(
        rows * columns * inputs[0].dtype.itemsize, sum(g.nbytes for g in inputs[1:]), columns
    )
    steps = pl.cdiv(m, rows)
    blocks = min(blocks, steps)
    workers = warpgroups * blocks
    # Anything but zeros makes it one copy of bytes, without a descriptor and its limits.
    oob_mode = plgpu.OOBFillMode.UNDEFINED if m % rows else plgpu.OOBFillMode.PROMISE_IN_BOUNDS

    def kernel(*refs):
        (x, *gain), (words, scale, zero_code, code_sums), (slot_refs, scratch, arrived, *gain_refs) = (
            refs[: len(inputs)],
            refs[len(inputs) : len(inputs) + 4],
            refs[len(inputs) + 4 :],
        )
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        worker = warpgroup * blocks + block  # neighbours in memory are on different multiprocessors

        def load(turn):
            slot = lax.rem(turn, slots)
            first_row = (worker + turn * workers) * rows
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(first_row, rows)],
                slot_refs.at[warpgroup, slot],
                arrived.at[warpgroup * slots + slot],
                oob_mode=oob_mode,
            )

        turns = lax.div(steps - worker + workers - 1, workers)
        for turn in range(slots):
            pl.when(turn < turns)(functools.partial(load, turn))
        if gain:
            gain_slot, gain_arrived = gain_refs

            @pl.when(warpgroup == 0)
            def _():
                plgpu.copy_gmem_to_smem(gain[0], gain_slot, gain_arrived, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

            plgpu.barrier_wait(gain_arrived)

        @pl.loop(0, turns)
        def _(turn):
            slot = lax.rem(turn, slots)
            plgpu.barrier_wait(arrived.at[warpgroup * slots + slot])
            first_row = (worker + turn * workers) * rows
            operands = (slot_refs.at[warpgroup, slot], scratch.at[warpgroup], words, scale, zero_code, code_sums)
            operands += tuple(gain_refs[:1])
            if interpret is None:
                _emit(quantizer, first_row, operands)
            else:
                _emulate(quantizer, first_row, *operands)
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
            jax.ShapeDtypeStruct((planes, m, quantizer.row_words), jnp.uint32),
            jax.ShapeDtypeStruct((m,), jnp.float32),
            jax.ShapeDtypeStruct((m,), jnp.int32),
            jax.ShapeDtypeStruct((m,), jnp.int32),
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


def _share_memory(slot_bytes: int, gain_bytes: int, columns: int) -> tuple[int, int]:
    """Warpgroups of a block, and slots for each."""
    fit = (_SLOT_BUDGET - gain_bytes) // slot_bytes
    if fit < 1:
        raise NotImplementedError(
            f"rows of {columns} numbers take {slot_bytes + gain_bytes} bytes, more than the {_SLOT_BUDGET} of shared memory"
        )
    # Two slots a warpgroup let it work while it loads; where rows are too long for that, one
    # warpgroup loads while another works.
    warpgroups = min(fit, _MAX_WARPGROUPS) if fit < 6 else min(fit // 2, _MAX_WARPGROUPS)
    return warpgroups, 1 if fit < 6 else min(fit // warpgroups, _MAX_BARRIERS // warpgroups)


def _emit(quantizer: RowQuantizer, first_row: Int[Array, ""], operands: tuple) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(operands)))
    def emit(_, first_row, *refs):
        quantizer.emit(first_row.registers.item(), *refs)

    emit(first_row, *operands)


def _emulate(quantizer: RowQuantizer, first_row, x, scratch, words, scale, zero_code, code_sums, gain=None) -> None:
    """The same in jnp, for interpret mode."""
    a_format, k = quantizer.code_words.a_format, quantizer.k
    numbers = x[...].astype(jnp.float32)[:, :k]
    if gain is not None:
        numbers = normalize(numbers, RMSNorm(gain[...][:k], quantizer.eps))
    tokens = quantize_tokens(numbers, a_format)
    packed = (
        _pack_bytes(tokens.codes, a_format) if quantizer.code_words.signed else _pack_planes(tokens.codes, a_format)
    )
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, quantizer.row_words - packed.shape[2])))
    zero_codes = (tokens.zero_value + a_format.max_value) // 2 if a_format.bits > 1 else tokens.zero_value
    sums = jnp.sum(tokens.codes, axis=1, dtype=jnp.int32)
    for i in range(quantizer.rows):

        @pl.when(first_row + i < quantizer.m)
        def _(i=i):
            words[:, first_row + i] = packed[:, i]
            scale[first_row + i] = tokens.scale[i]
            zero_code[first_row + i] = zero_codes[i]
            code_sums[first_row + i] = sums[i]

    plgpu.commit_smem()  # what was read may be overwritten by TMA


def normalize(x: Float[Array, "m k"], norm: RMSNorm) -> Float[Array, "m k"]:
    """RMSNorm in float32."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + norm.eps) * norm.gain.astype(jnp.float32)


def _pack_planes(codes: UInt8[Array, "m k"], a_format: BipolarFormat) -> UInt32[Array, "planes m words"]:
    # `pack_codes`, which a kernel cannot call since it holds a constant array.
    bits = jnp.stack([a_format.bit(codes, plane) for plane in range(a_format.bits)])
    return _join(_fill_up(bits, WORD_BITS).reshape(*bits.shape[:2], -1, WORD_BITS), 1)


def _pack_bytes(codes: UInt8[Array, "m k"], a_format: BipolarFormat) -> UInt32[Array, "1 m words"]:
    signed = _fill_up(a_format.signed_codes(codes), BLOCK).astype(jnp.uint8)
    by_word = jnp.swapaxes(signed.reshape(1, codes.shape[0], -1, 4, 8), 3, 4)
    return _join(by_word, 8).reshape(1, codes.shape[0], -1)


def _join(fields: UInt8[Array, "*shape fields"], width: int) -> UInt32[Array, "*shape"]:
    """Words of fields of so many bits, the first field in the lowest."""
    shifts = jnp.arange(0, WORD_BITS, width, dtype=jnp.uint32)
    return jnp.sum(fields.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)

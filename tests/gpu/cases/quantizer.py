"""Activations quantized and packed on the GPU: scales, zero codes and codes of `quantize_tokens`."""

from __future__ import annotations

import functools
import itertools

import jax
import ml_dtypes
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.hadamard import LARGEST_WARP_BLOCK, Hadamard, hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from tests.gpu.cases.operands import generator
from tests.gpu.trial import Case, Trial, one_program

_DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)
_OPERANDS = ("planes", "int8")
# Rows of one to several warps, of a warpgroup, and enough rows for few threads each.
_SIZES = [(9, 100), (8, 1024), (33, 1568), (1, 4096), (3, 13000), (700, 600), (1100, 1088), (300, 6144)]
_PROLOGUES = ("rms", "layer", "silu gated", "gelu gated", "silu", "gelu", "relu")
# Rotated in the largest blocks of powers of two that divide them.
_ROTATED = ("rotated", "silu gated rotated", "relu rotated")
_ROTATED_SIZES = [(1, 14336), (33, 1536), (3, 4224), (1100, 1088), (700, 512), (300, 6144), (9, 100), (1100, 1056)]


def cases() -> list[Case]:
    plain = [
        _case(*_SIZES[(bits + 3 * turn) % len(_SIZES)], bits, operand, _DTYPES[(bits + turn) % 3], None)
        for bits, operand, turn in itertools.product(range(1, 9), _OPERANDS, range(2))
    ]
    with_prologue = [
        _case(m, k, bits, _OPERANDS[(index + turn) % 2], _DTYPES[(index + turn) % 3], prologue)
        for index, prologue in enumerate(_PROLOGUES)
        for turn, (m, k, bits) in enumerate([(9, 100, 8), (3, 4100, 4), (700, 300, 8)])
    ]
    clipped = [_case(33, 1568, bits, _OPERANDS[bits % 2], np.float32, None, 0.85) for bits in (1, 3, 4, 8)]
    symmetric = [
        _case(33, 1568, bits, _OPERANDS[bits % 2], np.float32, None, span, True)
        for bits, span in [(2, 1.0), (3, 0.85), (4, 1.0), (8, 1.0)]
    ]
    rotated = [
        _case(m, k, (8, 4, 2)[index % 3], _OPERANDS[(index + turn) % 2], _DTYPES[(index + turn) % 3], _ROTATED[turn])
        for index, (m, k) in enumerate(_ROTATED_SIZES)
        for turn in range(3)
    ]
    return plain + with_prologue + clipped + symmetric + rotated


def small() -> dict[str, Case]:
    return {
        "quantizer": _case(9, 100, 3, "planes", np.float32, None),
        "quantizer, norm": _case(5, 70, 8, "int8", ml_dtypes.bfloat16, "rms"),
        "quantizer, rotation": _case(5, 192, 8, "int8", ml_dtypes.bfloat16, "silu gated rotated"),
    }


def _case(
    m: int, k: int, bits: int, operand: str, dtype, prologue: str | None, span: float = 1.0, symmetric: bool = False
) -> Case:
    a_format = BipolarFormat(bits, span=span, symmetric=symmetric)

    def make() -> Trial:
        rng = generator(m, k, bits)
        wanted = None if prologue is None else _prologue(prologue, rng, k)
        x = _rows(rng, m, k * (1 if wanted is None else wanted.parts), dtype)
        tokens = _on_cpu(x, a_format, wanted)

        def check(packed):
            words, scale, zero_code, code_sums = packed
            codes = _unpacked(np.asarray(words), a_format, operand, k)
            np.testing.assert_array_equal(code_sums, codes.sum(axis=1))
            if not (wanted is None or isinstance(wanted, Hadamard)):
                # Sums in another order and the last bits of functions turn what is nearly a tie.
                np.testing.assert_allclose(scale, tokens.scale, rtol=4e-6)
                difference = np.abs(codes - tokens.codes.astype(np.int32))
                assert difference.max() <= 1, f"codes {difference.max()} apart"
                most = max(2, codes.size // 1000)
                assert difference.sum() <= most, f"{difference.sum()} codes of {codes.size} differ, limit {most}"
                return
            zero = 0 * tokens.zero_value if bits == 1 else (tokens.zero_value + a_format.max_value) // 2
            np.testing.assert_array_equal(scale, tokens.scale)
            np.testing.assert_array_equal(zero_code, zero)
            np.testing.assert_array_equal(codes, tokens.codes)

        def quantize(x, wanted):
            packed = quantize_and_pack(x, a_format, operand, prologue=wanted, interpret=interpret_params())
            vectors = (packed.scale, packed.zero_code, packed.code_sums)
            # Elements of the vectors from m on are undefined.
            return packed.words, *(vector[:m] for vector in vectors)

        return one_program(quantize, (x, wanted), check)

    note = prologue or ("" if span == 1 else f"span {span}") + (" symmetric" if symmetric else "")
    return Case(f"A{bits} {operand} {m}x{k} {np.dtype(dtype).name} {note}".strip(), make)


def _rows(rng: np.random.Generator, m: int, k: int, dtype) -> np.ndarray:
    """Rows of different sizes; without a prologue's ties, some with zeros, small numbers, and ties."""
    x = rng.standard_normal((m, k)) * rng.lognormal(size=(m, 1))
    if m >= 8:
        x[0] = 0
        x[1] = np.where(x[1] < 0, -0.0, x[1])
        x[3], x[4] = np.abs(x[3]), -np.abs(x[4])
        x[5] *= 1e-3
    return x.astype(dtype)


def _prologue(name: str, rng: np.random.Generator, k: int) -> Prologue:
    gain, bias = (1 + rng.normal(size=k) / 4).astype(np.float32), (rng.normal(size=k) / 4).astype(np.float32)
    if name == "rms":
        return RMSNorm(gain, 1e-5)
    if name == "layer":
        return LayerNorm(gain, bias, 1e-5)
    function, *others = name.split()
    rotation = hadamard(k, block=min(k & -k, LARGEST_WARP_BLOCK)) if name.endswith("rotated") else None
    return rotation if function == "rotated" else Activation(function, gated="gated" in others, rotation=rotation)


def _on_cpu(x: np.ndarray, a_format: BipolarFormat, prologue: Prologue | None):
    """The definition, compiled by XLA for CPUs."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(functools.partial(quantize_tokens, a_format=a_format))(x, prologue=prologue))


def _unpacked(words: np.ndarray, a_format: BipolarFormat, operand: str, k: int) -> np.ndarray:
    """int32 codes [m, k], by the definition of the words; raises AssertionError where filler is not zero."""
    m = words.shape[1]
    if operand == "planes":
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little").astype(np.int32)
        codes = np.sum(bits << np.arange(len(bits)).reshape(-1, 1, 1), axis=0)
    else:  # byte t of word 8 B + j is element 32 B + 8 t + j
        codes = words.astype("<u4").view(np.int8).reshape(m, -1, 8, 4).swapaxes(2, 3).reshape(m, -1).astype(np.int32)
    assert not codes[:, k:].any(), "what fills a row is not zero"
    return codes[:, :k] + (0 if operand == "planes" else a_format.code_offset)

"""The Hopper quantizer gives the numbers of `quantize_tokens`, packed.

Three ways, since none sees everything without a GPU: what the threads do is run in numpy, thread
by thread (`warpgroup_simulator`); the pipeline around it in Pallas' interpret mode, which finds
races; and all of it is compiled to machine code.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.kernels.sm90.quantize_rows import launch
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens, quantize_and_pack
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import SCRATCH_WORDS
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

pytestmark = pytest.mark.usefixtures("clean_interpreter")
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def numbers(m: int, k: int, dtype, seed: int = 0) -> jax.Array:
    """Rows of different sizes, some of them awkward."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * rng.lognormal(size=(m, 1))
    if m >= 8:
        x[0] = 0
        x[1] = np.where(x[1] < 0, -0.0, x[1])
        x[2] = rng.integers(-1, 2, k)  # ties at both ends of the grid
        x[3], x[4] = np.abs(x[3]), -np.abs(x[4])
        x[5] *= 1e-7
        x[6] = rng.integers(-8, 9, k)
    return jnp.asarray(x, dtype)


def unpacked(packed: PackedTokens, a_format: BipolarFormat, operand: str, k: int) -> np.ndarray:
    """The codes, by the definition of the words; what follows them must be zero."""
    words = np.asarray(packed.words)
    if operand == "planes":
        assert words.shape[0] == a_format.bits
        assert words.shape[2] == -(-k // 128) * 4
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little").astype(np.int32)
        codes = sum(plane << i for i, plane in enumerate(bits))
        assert not codes[:, k:].any()
        return codes[:, :k]
    planes, m, blocks = words.shape[0], words.shape[1], -(-k // 32)
    assert (planes, words.shape[2]) == (1, 8 * blocks)
    in_bytes = words.astype("<u4").view(np.int8).reshape(m, blocks, 8, 4)
    codes = np.empty((m, blocks, 32), np.int32)
    for j in range(8):
        for t in range(4):
            codes[:, :, 8 * t + j] = in_bytes[:, :, j, t]
    codes = codes.reshape(m, -1)
    assert not codes[:, k:].any()
    return codes[:, :k] + a_format.code_offset


def assert_same(packed: PackedTokens, x, a_format: BipolarFormat, operand: str, prologue=None) -> None:
    """Bit for bit what `quantize_tokens` gives."""
    tokens = jax.jit(quantize_tokens, static_argnums=1)(x, a_format, prologue)
    zero_code = 0 * tokens.zero_value if a_format.bits == 1 else (tokens.zero_value + a_format.max_value) // 2
    np.testing.assert_array_equal(packed.scale[: len(x)], tokens.scale)
    np.testing.assert_array_equal(packed.zero_code[: len(x)], zero_code)
    np.testing.assert_array_equal(unpacked(packed, a_format, operand, x.shape[1]), tokens.codes)
    np.testing.assert_array_equal(packed.code_sums[: len(x)], np.asarray(tokens.codes).sum(axis=1, dtype=np.int32))


@pytest.fixture
def simulate(monkeypatch):
    """Runs what the warpgroups do, slot after slot."""

    def run(x, a_format, operand, prologue=None) -> PackedTokens:
        quantizer, (columns, *vectors) = launch.plan(x, a_format, operand, prologue)
        columns, vectors = np.asarray(columns), [np.asarray(vector) for vector in vectors]
        m, rows = x.shape[0], quantizer.rows
        words = np.full((quantizer.planes, m, quantizer.row_words), 0xABABABAB, np.uint32)
        scale, zero_code, code_sums = np.full(m, np.nan, np.float32), np.full(m, -1, np.int32), np.full(m, -1, np.int32)
        for first in range(0, m, rows):
            slot = np.full((rows, columns.shape[1]), np.nan, columns.dtype)
            slot[: min(rows, m - first)] = columns[first : first + rows]
            scratch = np.full(SCRATCH_WORDS, -1, np.int32)
            with monkeypatch.context() as patch:
                warpgroup_simulator.install(patch)
                first_row = warpgroup_simulator.int32(first)
                quantizer.quantize(first_row, slot, scratch, words, scale, zero_code, code_sums, *vectors)
        return PackedTokens(words, scale, zero_code, code_sums)

    return run


@pytest.mark.parametrize("operand", ["planes", "int8"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.sample(2)
def test_threads_compute_the_numbers_of_quantize_tokens(bits, operand, simulate):
    a_format = BipolarFormat(bits)
    # A warp a row, then a warpgroup; k below, at and above what the threads take at a time.
    for m, k, dtype in [(9, 100, bits % 3), (8, 1024, 0), (9, 1568, 0), (1, 4096, (bits + 1) % 3), (3, 13000, 0)]:
        x = numbers(m, k, DTYPES[dtype], seed=k + bits)
        assert_same(simulate(x, a_format, operand), x, a_format, operand)
    x = numbers(9, 100, jnp.float32, seed=bits)
    for other in (
        BipolarFormat(bits, span=0.85),
        BipolarFormat(bits, span=0.85 + 0.15 * (bits % 2), symmetric=bits > 1),
    ):
        assert_same(simulate(x, other, operand), x, other, operand)


@pytest.mark.parametrize(("m", "k", "threads"), [(18, 600, 8), (33, 1000, 8), (9, 1088, 32), (16, 6144, 32)])
def test_many_rows_get_few_threads_each(m, k, threads, simulate, monkeypatch):
    monkeypatch.setattr(launch, "MULTIPROCESSORS", 1)
    x, a_format = numbers(m, k, jnp.bfloat16), BipolarFormat(4)
    for operand in ("planes", "int8"):
        assert launch.plan(x, a_format, operand, None)[0].threads == threads
        assert_same(simulate(x, a_format, operand), x, a_format, operand)


def test_loads_of_16_bit_numbers_meet_in_no_bank(simulate):
    warpgroup_simulator.bank_conflicts[0] = 0
    simulate(numbers(1, 8192, jnp.bfloat16), BipolarFormat(2), "planes")
    assert warpgroup_simulator.bank_conflicts == [0]


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("k", [96, 2048])
def test_nothing_infinite_or_undefined_passes_as_a_number(bits, k, simulate):
    x = np.array(numbers(9, k, jnp.float32))
    x[0, 0], x[1, -1], x[2, 5], x[3, k // 2] = np.nan, np.nan, np.inf, -np.inf
    x[4] = 3e38 * np.sign(x[4])  # too large a scale for one bit
    a_format = BipolarFormat(bits)
    packed = simulate(jnp.asarray(x), a_format, "planes")
    assert np.isnan(packed.scale[:2]).all()
    assert np.isinf(packed.scale[2:4]).all()
    assert np.isinf(packed.scale[4]) == (bits == 1)
    codes = unpacked(packed, a_format, "planes", k)
    np.testing.assert_array_equal(packed.code_sums, codes.sum(axis=1))
    others = PackedTokens(packed.words[:, 4:], packed.scale[4:], packed.zero_code[4:], packed.code_sums[4:])
    assert_same(others, jnp.asarray(x[4:]), a_format, "planes")


def a_prologue(name: str, k: int, dtype) -> Prologue:
    gain, bias = (numbers(1, k, dtype, seed=seed)[0] / 4 for seed in (1, 2))
    if name == "rms":
        return RMSNorm(1 + gain, 1e-5)
    if name == "layer":
        return LayerNorm(1 + gain, bias, 1e-5)
    function, *others = name.split()
    rotation = hadamard(k, block=int(others[-1])) if others and others[-1].isdecimal() else None
    return rotation if function == "rotated" else Activation(function, gated="gated" in others, rotation=rotation)


PROLOGUES = ("rms", "layer", "silu gated", "gelu gated", "silu", "gelu", "relu")


def assert_close(
    packed: PackedTokens, x, a_format: BipolarFormat, operand: str, prologue: Prologue, ties: float = 1e-3
) -> None:
    """The same but for the order of sums, and the last bits of functions, which turn fewer than this share of codes."""
    tokens = jax.jit(quantize_tokens, static_argnums=1)(x, a_format, prologue)
    np.testing.assert_allclose(packed.scale[: len(x)], tokens.scale, rtol=4e-6)
    codes = unpacked(packed, a_format, operand, tokens.codes.shape[1])
    difference = np.abs(codes - np.asarray(tokens.codes, np.int32))
    assert difference.max() <= 1
    assert difference.mean() < ties
    np.testing.assert_array_equal(packed.code_sums[: len(x)], codes.sum(axis=1))


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize(
    ("m", "k", "dtype", "vector_dtype"),
    [(9, 100, jnp.bfloat16, jnp.float32), (3, 1600, jnp.float16, jnp.bfloat16), (2, 4100, jnp.float32, jnp.float32)],
)
@pytest.mark.sample(2)
def test_threads_compute_the_prologue(m, k, dtype, vector_dtype, prologue, simulate):
    prologue, a_format = a_prologue(prologue, k, vector_dtype), BipolarFormat(8)
    x = numbers(m, prologue.parts * k, dtype)
    if m == 9:
        x = x.at[2:5].set(x[0])  # rows of two or three numbers only have ties everywhere, or nearly
    for operand in ("planes", "int8"):
        assert_close(simulate(x, a_format, operand, prologue), x, a_format, operand, prologue)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_rows_of_few_threads_have_prologues_too(prologue, simulate, monkeypatch):
    monkeypatch.setattr(launch, "MULTIPROCESSORS", 1)
    prologue, a_format = a_prologue(prologue, 300, jnp.float32), BipolarFormat(4)
    x = numbers(19, prologue.parts * 300, jnp.bfloat16)[7:]
    x = jnp.concatenate([x, x[:6]])
    assert launch.plan(x, a_format, "planes", prologue)[0].threads == 8
    assert_close(simulate(x, a_format, "planes", prologue), x, a_format, "planes", prologue)


@pytest.mark.parametrize(
    ("m", "k", "block", "dtype", "threads"),
    [
        (9, 192, 64, jnp.bfloat16, 32),  # lanes without a block
        (2, 1536, 256, jnp.float16, 128),  # the last warps have none
        (3, 4224, 128, jnp.float32, 128),
        (20, 512, 256, jnp.bfloat16, 8),
        (5, 1100, 4, jnp.bfloat16, 128),  # not a multiple of 32
    ],
)
def test_threads_rotate_bit_for_bit(m, k, block, dtype, threads, simulate, monkeypatch):
    if threads == 8:
        monkeypatch.setattr(launch, "MULTIPROCESSORS", 1)
    rotation, a_format, x = hadamard(k, block=block), BipolarFormat(8), numbers(m, k, dtype)
    assert launch.plan(x, a_format, "int8", rotation)[0].threads == threads
    assert_same(simulate(x, a_format, "int8", rotation), x, a_format, "int8", rotation)
    gated = Activation("silu", gated=True, rotation=rotation)
    x = numbers(m, 2 * k, dtype, seed=1)
    x = x.at[2:5].set(x[0]) if m < 8 else x[7:].at[-3:].set(x[7])
    assert_close(simulate(x, a_format, "planes", gated), x, a_format, "planes", gated)
    relu = Activation("relu", rotation=rotation)
    assert_same(simulate(x[:, :k], a_format, "planes", relu), x[:, :k], a_format, "planes", relu)


def test_the_deviations_of_a_layer_norm_survive_a_large_mean(simulate):
    x = 1000 + numbers(3, 100, jnp.float32)
    norm, a_format = a_prologue("layer", 100, jnp.float32), BipolarFormat(8)
    # A mean of 1000 is known to 6e-5, and a step is 0.03.
    assert_close(simulate(x, a_format, "int8", norm), x, a_format, "int8", norm, ties=1e-2)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_what_is_not_a_number_shows_after_a_prologue(prologue, simulate):
    prologue = a_prologue(prologue, 96, jnp.float32)
    x = np.array(numbers(4, prologue.parts * 96, jnp.float32)) + 1
    x[0, 0], x[1, -1], x[2, 95] = np.nan, np.nan, np.inf
    packed = simulate(jnp.asarray(x), BipolarFormat(4), "planes", prologue)
    assert not np.isfinite(packed.scale[:3]).any()
    assert np.isfinite(packed.scale[3])


def interpreted(x, a_format, operand, prologue=None, blocks=2) -> PackedTokens:
    """In interpret mode, which must find no race."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    run = functools.partial(
        quantize_and_pack, a_format=a_format, operand=operand, prologue=prologue, blocks=blocks, interpret=params
    )
    packed = jax.block_until_ready(jax.jit(run)(x))
    assert not races_found()
    return packed


@pytest.mark.parametrize(
    ("m", "k", "bits", "operand", "dtype"),
    [
        (1, 1, 1, "planes", jnp.bfloat16),
        (39, 100, 3, "int8", jnp.float32),  # slots are used again, and the last is not full
        (11, 2112, 8, "planes", jnp.bfloat16),
        (6, 1300, 2, "int8", jnp.float16),
    ],
)
@pytest.mark.sample(2)
def test_the_pipeline_has_no_race(m, k, bits, operand, dtype, monkeypatch):
    monkeypatch.setattr(launch, "_WARPGROUPS", 2)
    monkeypatch.setattr(launch, "_BARRIERS", 4)
    x, a_format = numbers(m, k, dtype), BipolarFormat(bits)
    assert_same(interpreted(x, a_format, operand), x, a_format, operand)


@pytest.mark.parametrize("prologue", ["rms", "layer", "silu gated 2", "relu"])
@pytest.mark.sample(2)
def test_the_pipeline_computes_the_prologue(prologue, monkeypatch):
    monkeypatch.setattr(launch, "_WARPGROUPS", 2)
    prologue, a_format = a_prologue(prologue, 70, jnp.bfloat16), BipolarFormat(4)
    x = numbers(5, prologue.parts * 70, jnp.float32)
    packed = interpreted(x, a_format, "planes", prologue)
    assert_close(packed, x, a_format, "planes", prologue)


@pytest.mark.parametrize(
    ("slot_bytes", "gain_bytes", "warpgroups", "slots"),
    [
        (1024, 0, 4, 8),
        (16384, 0, 4, 3),
        (2**15, 0, 3, 2),
        (22016, 22016, 4, 2),
        (57344, 0, 4, 1),
        (114688, 0, 2, 1),
        (131072, 0, 1, 1),
    ],
)
def test_shared_memory_is_filled_with_slots(slot_bytes, gain_bytes, warpgroups, slots):
    assert launch._share_memory(slot_bytes, gain_bytes) == (warpgroups, slots)


def test_what_it_cannot_do_is_said():
    x, four = jnp.ones((2, 64)), BipolarFormat(4)
    with pytest.raises(ValueError, match="float32"):
        quantize_and_pack(x.astype(jnp.int32), four, "planes")
    with pytest.raises(ValueError, match="ternary"):
        quantize_and_pack(x, TERNARY, "planes")
    with pytest.raises(ValueError, match="'bytes'"):
        quantize_and_pack(x, four, "bytes")
    with pytest.raises(ValueError, match=r"\(64,\)"):
        quantize_and_pack(x, four, "planes", prologue=RMSNorm(jnp.ones(32), 1e-5))
    with pytest.raises(ValueError, match="2 parts"):
        quantize_and_pack(jnp.ones((2, 63)), four, "planes", prologue=Activation("silu", gated=True))
    with pytest.raises(NotImplementedError, match="shared memory"):
        jax.eval_shape(lambda: quantize_and_pack(jnp.ones((1, 1 << 17), jnp.bfloat16), four, "planes"))


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize(
    ("m", "k", "bits", "operand", "dtype", "prologue"),
    [
        (8192, 8192, 1, "planes", jnp.bfloat16, None),
        (8192, 8192, 8, "planes", jnp.bfloat16, "rms"),
        (2048, 11008, 8, "int8", jnp.bfloat16, None),
        (4097, 4096, 4, "planes", jnp.float16, None),
        (5, 100, 3, "int8", jnp.float32, "rms"),
        (64, 4096, 8, "int8", jnp.bfloat16, "rms"),  # rows in memory, as the next three
        (16, 14336, 8, "int8", jnp.bfloat16, None),
        (8, 16384, 8, "int8", jnp.float32, "layer"),
        (4, 32768, 5, "planes", jnp.float32, None),
        (2048, 28672, 2, "planes", jnp.bfloat16, "rms"),
        (2048, 4096, 2, "planes", jnp.bfloat16, "layer"),
        (2048, 11008, 8, "int8", jnp.bfloat16, "silu gated"),
        (2048, 28672, 2, "planes", jnp.bfloat16, "silu gated"),
        (2048, 14336, 8, "int8", jnp.bfloat16, "silu gated 64"),
        (1024, 14336, 8, "int8", jnp.bfloat16, "rotated 256"),
        (1024, 8192, 4, "planes", jnp.bfloat16, "gelu 32"),
        (4000, 1000, 8, "planes", jnp.float32, "gelu gated"),
        (2048, 16384, 8, "planes", jnp.bfloat16, "relu"),
    ],
)
@pytest.mark.sample(2)
def test_it_compiles_for_the_h200_without_spills(m, k, bits, operand, dtype, prologue):
    prologue = None if prologue is None else jax.eval_shape(lambda: a_prologue(prologue, k, dtype))
    parts = 1 if prologue is None else prologue.parts

    def run(x, prologue):
        return quantize_and_pack(x, BipolarFormat(bits), operand, prologue=prologue)

    _, report = sm90_compile.compile_for_h200(run, jax.ShapeDtypeStruct((m, parts * k), dtype), prologue)
    assert len(report.registers) == 1
    assert report.spill_bytes == report.stack_bytes == 0

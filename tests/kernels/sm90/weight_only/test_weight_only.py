"""Float activations times packed weights on Hopper: threads simulated, the kernel interpreted, and compiled."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import BF16, F16
from bipolar_jax.kernels.sm90.arithmetic.operands import weight_words
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.weight_only import threads
from bipolar_jax.kernels.sm90.weight_only.config import (
    WeightOnlyShape,
    WeightOnlyTiling,
    most_tokens,
    weight_only_tiling,
)
from bipolar_jax.kernels.sm90.weight_only.launch import weight_only_product
from bipolar_jax.kernels.sm90.weight_only.unpack import unpack
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("clean_interpreter")]

FORMATS = [*map(BipolarFormat, range(1, 9)), TERNARY]
_NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def packed(fmt: BipolarFormat, n: int, k: int, group_size: int | None = None, *, offset: bool = False):
    """Weights [k, n] of random codes, scales and offsets."""
    groups, rng = -(-k // (group_size or k)), np.random.default_rng(n + k)
    scale = rng.uniform(0.5, 1.5, (n, groups)).astype(np.float32)
    offsets = jnp.asarray(rng.normal(size=(n, groups)), jnp.float32) if offset else None
    codes = jnp.asarray(random_codes(fmt, n, k, 1))
    w = bj.from_codes(codes, fmt, -1, jnp.asarray(scale), offsets, group_size)
    return w.T


def activations(m: int, k: int, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(m * k).normal(size=(m, k)), dtype)


def check(got, x, w, bias=None):
    """The product of the dequantized weights in float64, up to float32 sums and the rounding of the output."""
    w_hat, wide = np.asarray(w.dequantize(), np.float64), np.asarray(x, np.float64)
    term = 0 if bias is None else np.asarray(bias, np.float64)
    offset = 0 if w.offset is None else np.max(np.abs(w.offset))
    size = np.abs(wide) @ (np.abs(w_hat) + 2 * offset) + np.abs(term)
    assert got.dtype == x.dtype
    error = np.abs(np.asarray(got, np.float64) - (wide @ w_hat + term))
    exact = np.abs(wide @ w_hat + term)
    assert np.all(error <= float(jnp.finfo(x.dtype).eps) * exact + 2**-19 * size)


@pytest.mark.parametrize("float_type", [BF16, F16], ids=lambda float_type: float_type.name)
@pytest.mark.parametrize("w_format", FORMATS, ids=lambda fmt: fmt.name)
def test_values_are_unpacked_exactly(w_format, float_type, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    codes = random_codes(w_format, 128, 32, 0)
    planes = [
        np.sum(np.asarray(w_format.bit(codes, i), np.uint32) << np.arange(32, dtype=np.uint32), 1, dtype=np.uint32)
        for i in range(w_format.bits)
    ]
    pairs = unpack([plane.view(np.int32) for plane in planes], w_format, float_type)
    got = np.stack([pair.copy().view(_NUMPY[float_type.name]).reshape(128, 2) for pair in pairs], 2).reshape(128, 32)
    np.testing.assert_array_equal(got.astype(int), 2 * codes.astype(int) - w_format.max_value)


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of 32 words as TMA writes them."""
    pieces = rows.reshape(-1, 8, 4)
    return np.stack([row[np.arange(8) ^ (i % 8)] for i, row in enumerate(pieces)]).reshape(rows.shape)


@pytest.mark.parametrize(
    ("m", "w_bits", "group_size", "offset", "dtype"),
    [
        (1, 4, None, False, jnp.bfloat16),
        (1, 1, None, True, jnp.float16),
        (3, 2, 128, True, jnp.bfloat16),
        (11, 8, 256, False, jnp.float16),
        (2, 3, 64, True, jnp.bfloat16),
        (8, 5, 32, True, jnp.bfloat16),
        (32, 1, None, True, jnp.bfloat16),
    ],
)
def test_threads_multiply_scale_and_finish(m, w_bits, group_size, offset, dtype, monkeypatch):
    """A tile whose last rows are beyond n, two warpgroups, the second of which has a part that K ends in."""
    n, k, first_row = 61 + 32, K_SLICE + 384, 64
    w, x = packed(BipolarFormat(w_bits), n, k, group_size, offset=offset), activations(m, k, dtype)
    rows = weight_only_tiling(m, k, w_bits, group_size).rows
    shape = WeightOnlyShape(
        m, n, k, w.format, group_size, w.num_groups, offset, jnp.dtype(dtype), WeightOnlyTiling(rows, 2, 8, 1)
    )
    bias = np.random.default_rng(0).normal(size=n).astype(np.float32)
    words = np.zeros((w_bits, first_row + rows, 2 * K_SLICE // 32), np.uint32)
    words[:, :n, : k // 32] = w.planes
    x_words, scale = np.array(x).view(np.uint16), np.array(w.scale)
    offsets = np.array(w.offset) if offset else None
    warpgroup_simulator.install(monkeypatch)
    int32, float32 = warpgroup_simulator.int32, warpgroup_simulator.float32
    blocks = shape.width // 8
    shared = np.zeros((2, shape.sums_rows, shape.width), np.float32)
    thread = np.arange(128)
    for warpgroup in range(2):
        sums = [float32(0)] * (4 * blocks * shape.row_tiles)
        x_sums = [float32(0)] * (4 * blocks) if offset and group_size is None else []
        part = words[:, first_row : first_row + rows, 32 * warpgroup : 32 * (warpgroup + 1)]
        planes = swizzled(part)
        operands = (scale, offsets)
        sums, x_sums = threads.add_slice(
            shape, sums, x_sums, planes, x_words, *operands, int32(warpgroup), int32(first_row)
        )
        if group_size is None:
            terms = threads.row_terms(shape, *operands, int32(first_row))
            sums = threads.scaled(shape, sums, x_sums, terms)
        else:
            threads.prefetch_groups(shape, *operands, int32(warpgroup + 1), int32(first_row))
        places = itertools.product(range(shape.row_tiles), range(blocks), range(2), range(2))
        for number, (tile, block, half, column) in zip(sums, places, strict=True):
            row = 64 * tile + 16 * (thread // 32) + 8 * half + thread % 32 // 4
            shared[warpgroup, row, 8 * block + 2 * (thread % 4) + column] = number
    out = np.zeros((m, shape.tiles * rows), np.uint16)
    threads.finish(shape, shared, bias, out, int32(first_row))
    monkeypatch.undo()
    got = out.view(np.array(x).dtype)[:, first_row:n]
    scale, offset, row_sums = jax.tree.map(lambda leaf: leaf[first_row:], (w.scale, w.offset, w.row_sums))
    tail = bj.BipolarArray(w.planes[:, first_row:], scale, offset, row_sums, w.format, k, -2, w.group_size)
    check(got, x, tail, bias[first_row:])


def interpreted_product(x, w, bias=None, **fields):
    product = weight_only_product(
        x,
        weight_words(w, "planes"),
        w.scale,
        w.offset,
        bias,
        w.format,
        w.group_size,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        **fields,
    )
    assert not races_found()
    return product


@pytest.mark.parametrize(
    ("m", "n", "k", "w_format", "group_size", "offset", "dtype"),
    [
        (1, 64, 1024, BipolarFormat(4), None, False, jnp.bfloat16),
        (1, 100, 2500, BipolarFormat(1), None, True, jnp.float16),
        (8, 33, 300, BipolarFormat(8), None, False, jnp.bfloat16),
        (2, 70, 4200, TERNARY, 128, False, jnp.bfloat16),
        (9, 65, 1100, BipolarFormat(3), 64, True, jnp.float16),
        (7, 40, 90, BipolarFormat(5), 32, True, jnp.bfloat16),
        (32, 64, 1500, BipolarFormat(2), 256, True, jnp.bfloat16),
    ],
)
@pytest.mark.sample(2)
def test_products_are_those_of_the_dequantized_weights(m, n, k, w_format, group_size, offset, dtype):
    x, w = activations(m, k, dtype), packed(w_format, n, k, group_size, offset=offset)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=n), jnp.float32)
    check(interpreted_product(x, w, bias), x, w, bias)


@pytest.mark.parametrize(
    ("tiling", "blocks", "group_size"),
    [
        (WeightOnlyTiling(32, 4, 3, 2), 1, None),
        (WeightOnlyTiling(32, 4, 3, 2), 1, 128),
        (WeightOnlyTiling(32, 2, 2, 1), 2, 128),
        (WeightOnlyTiling(64, 3, 2, 2), 1, None),
        (WeightOnlyTiling(16, 1, 7, 1), 3, 128),
    ],
    ids=str,
)
@pytest.mark.sample(1)
def test_rings_run_on_across_tiles(tiling, blocks, group_size):
    """More tiles than blocks, parts of K beyond its end, rings deeper and shallower than a tile's work."""
    x, w = activations(2, 4500, jnp.bfloat16), packed(BipolarFormat(3), 300, 4500, group_size)
    check(interpreted_product(x, w, tiling=tiling, blocks=blocks), x, w)


def test_matmul_takes_it_for_few_tokens():
    w, bias = packed(BipolarFormat(4), 40, 200, 64, offset=True), jnp.ones(40, jnp.bfloat16)
    with interpreted(plgpu.InterpretGPUParams()):
        for m in (1, 20):
            x = activations(m, 200, jnp.bfloat16)
            explanation = bj.explain(x, w, None)
            assert explanation.implementation == "sm90"
            assert explanation.kernel == "bfloat16 tensor cores, weights unpacked from 4 planes in registers, as rows"
            assert isinstance(explanation.tiling, WeightOnlyTiling)
            check(bj.matmul(x, w, None, bias=bias), x, w, bias)


@pytest.mark.parametrize(
    ("m", "dtype", "group_size", "reason"),
    [
        (1, jnp.float32, None, "must be bfloat16 or float16 .* not float32"),
        (65, jnp.bfloat16, None, "65 tokens of floats are not from 1 to 64"),
        (1, jnp.bfloat16, 48, "32, 64 or a multiple of 128 elements, not 48"),
    ],
)
def test_what_is_not_served_goes_to_xla(m, dtype, group_size, reason):
    x, w = activations(m, 192, dtype), packed(BipolarFormat(4), 8, 192, group_size)
    with interpreted(plgpu.InterpretGPUParams()):
        assert bj.explain(x, w, None).implementation == "xla"
        with pytest.raises(NotImplementedError, match=reason):
            bj.matmul(x, w, None, implementation="sm90")


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_every_number_of_tokens_and_planes_has_a_tiling(group_size):
    most = most_tokens(group_size)
    for m, bits in itertools.product(range(1, most + 1), range(1, 9)):
        tiling = weight_only_tiling(m, 8192, bits, group_size)
        assert tiling.slots >= 2
        assert tiling.warpgroups > 1
    with pytest.raises(ValueError, match=f"from 1 to {most}"):
        weight_only_tiling(most + 1, 8192, 4, group_size)


# As bfloat16 all, as float16, which differs in how values are unpacked, every other one.
COMPILED = [
    *[(1, 28672, 8192, bits, None, False) for bits in (1, 2, 4, 8)],
    (1, 28672, 8192, 4, 128, False),
    (1, 4096, 4096, 4, None, False),
    (1, 4096, 11008, 8, 128, True),
    (8, 12288, 4096, 2, 64, True),
    (16, 22016, 4096, 4, None, False),
    (16, 4096, 11008, 8, 64, True),
    (8, 4096, 4096, 8, 32, True),
    (32, 4096, 4096, 8, 128, True),
    (32, 4096, 4096, 4, None, True),
    (3, 217, 689, 5, None, False),
]


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize(
    ("m", "n", "k", "w_bits", "group_size", "offset", "dtype"),
    [*((*sizes, jnp.bfloat16) for sizes in COMPILED), *((*sizes, jnp.float16) for sizes in COMPILED[::2])],
)
@pytest.mark.sample(2)
def test_kernels_compile_without_spills(m, n, k, w_bits, group_size, offset, dtype):
    terms = jax.ShapeDtypeStruct((n, -(-k // (group_size or k))), jnp.float32)
    _, report = sm90_compile.compile_for_h200(
        lambda x, w, scale, offset, bias: weight_only_product(
            x, w, scale, offset, bias, BipolarFormat(w_bits), group_size
        ),
        jax.ShapeDtypeStruct((m, k), dtype),
        jax.ShapeDtypeStruct((w_bits, n, -(-k // 128) * 4), jnp.uint32),
        terms,
        terms if offset else None,
        jax.ShapeDtypeStruct((n,), jnp.float32),
    )
    assert report.registers
    assert report.spill_bytes == 0

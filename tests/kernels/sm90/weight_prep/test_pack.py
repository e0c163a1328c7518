"""Weights rounded and packed by Hopper's kernel are those that jnp gives: threads simulated, interpreted, compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.semantics import weights
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.weight_prep.pack import pack_columns
from bipolar_jax.kernels.sm90.weight_prep.pack_threads import ColumnPacking
from bipolar_jax.quantize.groups import num_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

FORMATS = [*map(BipolarFormat, (1, 2, 3, 4, 8)), TERNARY]
with_every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"W{fmt.name}")
needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
# k, n, groups and dtype. Whole blocks and a run more; less than a word beyond a run, and columns beyond a block; groups
# that end within a run, rows of words that are no multiple of 16 bytes; as few rows as there may be.
CASES = [
    (384, 64, None, "bfloat16"),
    (269, 71, 32, "float32"),
    (160, 3, 96, "bfloat16"),
    (32, 70, None, "float32"),
]


def operands(fmt, k, n, group_size, dtype):
    """Weights, half steps, and, where there are groups, offsets."""
    draw = np.random.default_rng(k)
    w = draw.standard_normal((k, n), np.float32)
    shape = (n, num_groups(k, group_size))
    half_steps = (draw.uniform(0.05, 0.3, shape) * fmt.max_value).astype(np.float32)
    offset = draw.uniform(-1, 1, shape).astype(np.float32) if group_size else None
    return jnp.asarray(w, dtype), jnp.asarray(half_steps), None if offset is None else jnp.asarray(offset)


def by_jnp(w, half_steps, offset, fmt, group_size):
    return jax.jit(lambda *case: weights.pack_weights(*case, fmt, group_size))(w, half_steps, offset)


def simulated(monkeypatch, w, half_steps, offset, fmt, group_size):
    """Planes and group sums as the threads write them; checks that they write every element."""
    packing = ColumnPacking(PTX_TYPES[w.dtype.name], fmt, *w.shape, group_size, offset is not None)
    inputs = [np.array(w), *(np.ascontiguousarray(np.array(a).T) for a in (half_steps, offset) if a is not None)]
    planes = np.full((fmt.bits, packing.n, packing.words), 0xABABABAB, np.uint32)
    sums = np.full((packing.num_sums, packing.n), -1, np.int32)
    with monkeypatch.context() as patch:
        warpgroup_simulator.install(patch)
        for block in range(packing.blocks):
            packing.pack_block(warpgroup_simulator.int32(block), *inputs, planes, sums)
    groups = np.arange(packing.num_sums) * packing.sum_length // (group_size or packing.k)
    return planes, np.stack([sums[groups == g].sum(0) for g in range(num_groups(packing.k, group_size))], 1)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fmt", "case"),
    [(fmt, CASES[(i + j) % len(CASES)]) for i, fmt in enumerate(FORMATS) for j in (0, 1)],
    ids=lambda part: f"W{part.name}" if isinstance(part, BipolarFormat) else str(part),
)
def test_threads_write_what_jnp_gives(fmt, case, monkeypatch):
    *_, group_size, _ = case
    case = operands(fmt, *case)
    assert_same(simulated(monkeypatch, *case, fmt, group_size), by_jnp(*case, fmt, group_size))


def test_threads_read_float16_and_five_planes(monkeypatch):
    fmt = BipolarFormat(5)
    case = operands(fmt, 75, 9, 64, "float16")
    assert_same(simulated(monkeypatch, *case, fmt, 64), by_jnp(*case, fmt, 64))


@pytest.mark.parametrize("fmt", [BipolarFormat(1), BipolarFormat(8), TERNARY], ids=lambda fmt: f"W{fmt.name}")
def test_numbers_and_scales_at_the_limits_are_rounded_alike(fmt, monkeypatch):
    numbers = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1.0, -1.0, 1.5, 127.5, -128]
    w = jnp.tile(jnp.asarray(numbers, jnp.float32), 3)[:, None] * jnp.ones((1, 6))
    half_steps = jnp.asarray([0, np.inf, np.nan, 1.0, 2.0**-126, 2.0**126], jnp.float32)[:, None]
    case = (w, half_steps, None)
    assert_same(simulated(monkeypatch, *case, fmt, None), by_jnp(*case, fmt, None))


def test_ternary_numbers_between_two_codes_are_rounded_alike(monkeypatch):
    """The same, though compilers may round a product that is added to, or not."""
    w, _, _ = operands(TERNARY, 256, 64, None, "bfloat16")
    half_steps = jnp.asarray(np.float32(0.5) / np.abs(np.asarray(w, np.float32)).max(0)[:, None])
    case = (w, half_steps, None)
    assert_same(simulated(monkeypatch, *case, TERNARY, None), by_jnp(*case, TERNARY, None))


@with_every_format
@pytest.mark.sample(2)
def test_blocks_write_what_is_theirs(fmt):
    case = operands(fmt, 269, 71, 32, "float32" if fmt.bits % 2 else "bfloat16")
    packed = pack_columns(*case, fmt, 32, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert_same(packed, by_jnp(*case, fmt, 32))
    assert not races_found()


def test_what_the_kernel_does_not_pack_is_said():
    ones = jnp.ones((2, 1))
    with pytest.raises(NotImplementedError, match="31 rows are fewer than the 32"):
        pack_columns(jnp.ones((31, 2)), ones, None, BipolarFormat(4), None)
    with pytest.raises(NotImplementedError, match="multiples of 32, not 48"):
        pack_columns(jnp.ones((96, 2)), jnp.ones((2, 2)), None, BipolarFormat(4), 48)


@needs_compiler
@with_every_format
@pytest.mark.parametrize(
    ("k", "n", "group_size", "dtype"), [(2048, 8192, None, "bfloat16"), (1000, 333, 64, "float32")]
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(fmt, k, n, group_size, dtype):
    per_group = jax.ShapeDtypeStruct((n, num_groups(k, group_size)), jnp.float32)
    avals = [jax.ShapeDtypeStruct((k, n), dtype), per_group, *[per_group] * (group_size is not None)]

    def pack(w, half_steps, offset=None):
        return pack_columns(w, half_steps, offset, fmt, group_size)

    _, report = sm90_compile.compile_for_h200(pack, *avals)
    assert len(report.registers) == 1
    assert report.registers[0] <= 168  # three blocks a multiprocessor
    assert report.spill_bytes == report.stack_bytes == 0

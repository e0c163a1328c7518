"""Planes expanded to bytes on Hopper are those of `expand_planes`: threads simulated, interpreted, and compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.operands import expand_planes
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.weight_prep.expand import Expansion, expand
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

FORMATS = [*map(BipolarFormat, range(1, 9)), TERNARY]
with_every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"W{fmt.name}")
needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
# Less than a block; rows of whole 16 bytes, in whole blocks of every format; a few blocks and a part of one.
SIZES = [(1, 1), (3, 5), (16, 32), (37, 44)]


def random_planes(fmt: BipolarFormat, *size: int) -> jax.Array:
    """Any bits, also those that no ternary code has."""
    return jax.random.bits(jax.random.key(size[-1]), (*size[:-2], fmt.bits, *size[-2:]), jnp.uint32)


@with_every_format
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.sample(2)
def test_threads_write_the_bytes_of_expand_planes(fmt, size, monkeypatch):
    planes = random_planes(fmt, *size)
    expansion = Expansion(fmt, size[0] * size[1])
    guard = np.full(8 * (expansion.words + expansion.block_words), 0xABABABAB, np.uint32)
    flat = np.array(planes).reshape(fmt.bits, -1)
    with monkeypatch.context() as patch:
        warpgroup_simulator.install(patch)
        for block in range(expansion.blocks):
            expansion.expand_block(warpgroup_simulator.int32(block), flat, guard)
    np.testing.assert_array_equal(guard[: 8 * expansion.words].reshape(1, size[0], -1), expand_planes(planes, fmt))
    assert (guard[8 * expansion.words :] == 0xABABABAB).all()


def test_sizes_fill_blocks_and_leave_parts_of_them():
    rests = {Expansion(fmt, n * words).words_of_last_block for n, words in SIZES for fmt in FORMATS}
    full = {Expansion(fmt, 16 * 32).block_words for fmt in FORMATS}
    assert full <= rests
    assert rests - full


@with_every_format
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.sample(2)
def test_blocks_write_what_is_theirs(fmt, size):
    planes = random_planes(fmt, *size)
    expanded = expand(planes, fmt, interpret=plgpu.InterpretGPUParams(detect_races=True))
    np.testing.assert_array_equal(expanded, expand_planes(planes, fmt))
    assert not races_found()


def test_a_batch_of_planes_is_expanded():
    fmt = BipolarFormat(5)
    planes = random_planes(fmt, 3, 6, 40)
    params = plgpu.InterpretGPUParams(detect_races=True)
    expanded = jax.vmap(lambda some: expand(some, fmt, interpret=params))(planes)
    np.testing.assert_array_equal(expanded, jax.vmap(lambda some: expand_planes(some, fmt))(planes))
    assert not races_found()


def test_planes_that_the_format_does_not_have_are_an_error():
    with pytest.raises(ValueError, match="has 4 planes, got 3"):
        expand(jnp.zeros((3, 2, 4), jnp.uint32), BipolarFormat(4))


@needs_compiler
@with_every_format
@pytest.mark.parametrize("size", [(22016, 128), (1001, 7)], ids=str)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(fmt, size):
    planes = jax.ShapeDtypeStruct((fmt.bits, *size), jnp.uint32)
    _, report = sm90_compile.compile_for_h200(lambda some: expand(some, fmt), planes)
    assert len(report.registers) == 1
    # So many threads fit a multiprocessor that loads of one block are under the stores of others.
    assert report.registers[0] <= 64
    assert report.spill_bytes == report.stack_bytes == 0


@needs_compiler
def test_more_bytes_than_32_bits_count_compile():
    planes = jax.ShapeDtypeStruct((8, 2**18, 2**12 + 1), jnp.uint32)
    _, report = sm90_compile.compile_for_h200(lambda some: expand(some, BipolarFormat(8)), planes)
    assert report.spill_bytes == 0


@needs_compiler
def test_a_stack_of_layers_is_read_where_it_is():
    """No slice of the planes is copied first."""
    fmt = BipolarFormat(4)

    def scanned(stack):
        def step(total, planes):
            return total + jnp.sum(expand(planes, fmt), dtype=jnp.uint32), None

        return jax.lax.scan(step, jnp.uint32(0), stack)[0]

    size = (fmt.bits, 4096, 128)
    compiled, _ = sm90_compile.compile_for_h200(scanned, jax.ShapeDtypeStruct((32, *size), jnp.uint32))
    nbytes = 4 * np.prod(size)
    # The bytes expanded, and little else.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * nbytes / fmt.bits + nbytes / 2


@needs_compiler
def test_a_batch_of_products_of_bytes_compiles(monkeypatch):
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    w = jax.eval_shape(lambda k: bj.quantize(k, 4, -2), jax.ShapeDtypeStruct((3, 200, 30), jnp.float32))

    def product(x, w):
        return bj.matmul(x, w, 8, implementation="sm90")

    x = jax.ShapeDtypeStruct((3, 100, 200), jnp.bfloat16)
    _, report = sm90_compile.compile_for_h200(product, x, w)
    assert len(report.registers) == 3  # the quantizer, the expansion, the product
    assert report.spill_bytes == 0

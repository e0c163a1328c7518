"""Prepared weights: every code is where its thread looks for it, and comes back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.gemm_expanded import layout
from tests.kernels.sm90.gemm_expanded.integer_groups import packed_planes, random_groups
from tests.support import sm90_compile
from tests.support.integer_products import random_codes

FORMATS = [*map(BipolarFormat, (1, 6, 7, 8)), TERNARY]  # every field; the test of the threads has all widths
unpack_terms = jax.jit(layout.unpack_terms)
N, K = 150, 200  # two tiles and two stages, both ragged


def prepared(codes, fmt, groups=None, **options):
    planes = packed_planes(codes, fmt)
    if groups is not None:
        options |= dict(group_size=groups.group_size, group_scale=groups.scale, group_offset=groups.offset)
    return layout.prepare(planes, fmt, codes.shape[1], **options)


def codes_by_definition(words, bits: int) -> np.ndarray:
    """The docstring of `layout`, code by code: [rows, positions] of one tile and stage."""
    flat = np.asarray(words).reshape(bits, 128, 4)
    codes = np.zeros((128, 128), int)
    for thread in range(128):
        warp, r, t = thread // 32, thread % 32 // 4, thread % 4
        for step in range(4):
            for b, h, p in np.ndindex(2, 2, 2):
                register, first = 4 * b + 2 * h + p, 0
                row, position = 64 * b + 16 * warp + 8 * p + r, 32 * step + 16 * h + 4 * t
                for width, shift in layout.fields_of(bits):
                    index = step * width + register * width // 8
                    word = int(flat[first + index // 4, thread, index % 4]) >> width * (register % (8 // width))
                    for i in range(4):
                        codes[row, position + i] |= ((word >> 8 * i) & ((1 << width) - 1)) << shift
                    first += width
    return codes


def test_fields_add_up_to_the_bits():
    for bits in range(1, 9):
        fields = layout.fields_of(bits)
        assert sum(width for width, _ in fields) == bits
        assert sorted(shift + i for width, shift in fields for i in range(width)) == list(range(bits))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"W{fmt.name}")
def test_planes_come_back(fmt):
    codes = random_codes(fmt, N, K, 0)
    weights = prepared(codes, fmt)
    assert weights.words.shape == (2, 2, fmt.bits, 512)
    np.testing.assert_array_equal(layout.planes_of(weights, fmt), packed_planes(codes, fmt))


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("group_size", [16, 32])
def test_every_code_is_where_its_thread_looks(bits, group_size):
    fmt = BipolarFormat(bits)
    groups = random_groups(fmt, N, K, group_size)
    weights = prepared(groups.codes, fmt, groups)
    found = codes_by_definition(np.asarray(weights.words)[1, 1], bits)
    element = np.arange(128)
    if not weights.natural_order:
        element = element // 32 * 32 + 8 * (element % 4) + element % 32 // 4
    filled = np.zeros((256, 256), int)
    filled[:N, :K] = groups.codes
    np.testing.assert_array_equal(found, filled[128:, 128 + element])
    assert weights.natural_order == (group_size == 16)


@pytest.mark.parametrize("group_size", [16, 48, 64, 128, 192])
def test_terms_are_those_of_every_row_and_chunk(group_size):
    """K ends within a group for every size."""
    fmt = BipolarFormat(2)
    groups = random_groups(fmt, N, 300, group_size)
    weights = prepared(groups.codes, fmt, groups)
    terms, chunk = np.asarray(weights.terms), 128 // weights.chunks
    assert chunk == np.gcd(group_size, 128)
    for stage in range(3):
        scale, offset = map(np.asarray, unpack_terms(terms[1, stage]))
        for number in range(weights.chunks):
            group = (128 * stage + number * chunk) // group_size
            if group < groups.scale.shape[1]:
                np.testing.assert_array_equal(scale[: N - 128, number], groups.scale[128:, group])
                np.testing.assert_array_equal(offset[: N - 128, number], groups.offset[128:, group].astype(int) + 128)
    assert not np.any(scale[N - 128 :])
    assert not np.any(offset[N - 128 :])


def test_terms_are_bytes_in_the_order_of_rows():
    """Word 2 (8 w + r) + b has s and o + 128 of row 64 b + 16 w + r, then of the row 8 later."""
    fmt = BipolarFormat(2)
    groups = random_groups(fmt, 128, 128, 64)
    terms = np.asarray(prepared(groups.codes, fmt, groups).terms)[0, 0]
    pairs = terms.view(np.uint8).reshape(2, 4, 8, 2, 2, 2)
    for chunk, w, r, b, p in np.ndindex(2, 4, 8, 2, 2):
        row = 64 * b + 16 * w + 8 * p + r
        assert pairs[chunk, w, r, b, p].tolist() == [groups.scale[row, chunk], int(groups.offset[row, chunk]) + 128]


def test_expanded_bytes_are_the_weights():
    fmt = BipolarFormat(5)
    groups = random_groups(fmt, 128, 128, 16)
    weights = prepared(groups.codes, fmt, groups)
    expanded = jax.jit(layout.expanded_in_jnp)(np.asarray(weights.words)[0, 0], np.asarray(weights.terms)[0, 0])
    np.testing.assert_array_equal(expanded, groups.values + 128)


def test_a_tile_has_gates_and_their_values():
    fmt, half = BipolarFormat(3), 70
    codes = random_codes(fmt, 2 * half, 40, 0)
    weights = prepared(codes, fmt, gated=True)
    unpack = jax.jit(layout.unpack_fields, static_argnums=1)
    tiles = np.asarray(unpack(weights.words, weights.natural_order))[:, 0, :, :40]
    np.testing.assert_array_equal(tiles[0, :64], codes[:64])
    np.testing.assert_array_equal(tiles[0, 64:], codes[half : half + 64])
    np.testing.assert_array_equal(tiles[1, :6], codes[64:half])
    assert not tiles[1, 6:64].any()
    np.testing.assert_array_equal(layout.planes_of(weights, fmt, gated=True), packed_planes(codes, fmt))


def test_tokens_in_natural_order():
    fmt = BipolarFormat(8)
    codes = random_codes(fmt, 3, 64, 0)
    words = layout.in_natural_order(code_words(jnp.asarray(codes), fmt, "int8"))
    np.testing.assert_array_equal(np.asarray(words).view(np.int8)[0], codes.astype(int) - 128)


def test_bytes_of_a_weight():
    """Two bytes a group, and the words of the codes."""
    fmt, n, k = BipolarFormat(4), 128, 1024
    for group_size, bits in ((128, 4.125), (64, 4.25), (32, 4.5)):
        groups = random_groups(fmt, n, k, group_size)
        weights = jax.eval_shape(functools.partial(prepared, groups.codes, fmt, groups))
        assert 32 * (weights.words.size + weights.terms.size) == bits * n * k


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
def test_preparing_takes_no_more_memory_than_the_weights():
    fmt, n, k = BipolarFormat(4), 4096, 4096
    terms = [jax.ShapeDtypeStruct((n, k // 128), dtype) for dtype in (jnp.uint8, jnp.int8)]

    def run(planes, scale, offset):
        return layout.prepare(planes, fmt, k, group_size=128, group_scale=scale, group_offset=offset)

    program, _ = sm90_compile.compile_for_h200(run, jax.ShapeDtypeStruct((4, n, k // 32), jnp.uint32), *terms)
    assert program.memory_analysis().temp_size_in_bytes <= n * k * 4 // 8


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (4, 24, "a multiple of 16 elements"),
        (7, 32, "at most 6 bits"),
        (4, 64, r"terms of groups must be \(8, 2\), got \(8, 4\)"),
    ],
)
def test_groups_that_the_layout_does_not_have_are_an_error(bits, group_size, message):
    fmt = BipolarFormat(bits)
    planes, terms = packed_planes(np.zeros((8, 128), np.uint8), fmt), np.ones((8, 4))
    with pytest.raises(ValueError, match=message):
        layout.prepare(
            planes,
            fmt,
            128,
            group_size=group_size,
            group_scale=terms.astype(np.uint8),
            group_offset=terms.astype(np.int8),
        )

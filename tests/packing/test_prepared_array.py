"""Prepared weights: every code is where its thread looks for it, and comes back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.packing import fields
from bipolar_jax.quantize.integer_groups import IntegerGroups
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile
from tests.support.integer_products import random_codes

FORMATS = [*map(BipolarFormat, (1, 6, 7, 8)), TERNARY]  # every field; the test of the threads has all widths
part_terms = jax.jit(fields.part_terms)
N, K = 150, 200  # two tiles and two stages, both ragged


def codes_of(fmt, n: int = N, k: int = K):
    return array_of_codes(random_codes(fmt, n, k, 0), fmt, np.ones(n, np.float32))


def groups_of(fmt, group_size: int, n: int = N, k: int = K):
    groups = random_groups(fmt, n, k, group_size)
    return groups, array_of_groups(groups, fmt, np.ones(n, np.float32))


def codes_by_definition(words, bits: int) -> np.ndarray:
    """The docstring of `fields`, code by code: [rows, positions] of one tile and stage."""
    flat = np.asarray(words).reshape(4, bits, 32, 4)
    codes = np.zeros((128, 128), int)
    for thread in range(128):
        warp, r, t = thread // 32, thread % 32 // 4, thread % 4
        for step in range(4):
            for b, h, p in np.ndindex(2, 2, 2):
                row, position = 64 * b + 16 * warp + 8 * p + r, 32 * step + 16 * h + 4 * t
                for field in fields.fields_of(bits, step)[4 * b + 2 * h + p]:
                    index = fields.step_words(bits, step)[field.word]
                    word = int(flat[warp, index // 4, thread % 32, index % 4]) >> field.position
                    for i in range(4):
                        codes[row, position + i] |= ((word >> 8 * i) & ((1 << field.width) - 1)) << field.shift
    return codes


def test_fields_are_all_bits_of_codes_and_words():
    for bits in range(1, 9):
        places = []
        for step in range(4):
            words = fields.step_words(bits, step)
            for register in fields.fields_of(bits, step):
                assert sorted(f.shift + i for f in register for i in range(f.width)) == list(range(bits))
                places += [(words[f.word], f.position + i) for f in register for i in range(f.width)]
        assert sorted(places) == [(word, position) for word in range(4 * bits) for position in range(8)]
    assert sum(len(register) for register in fields.fields_of(3, 0)) == 10


@pytest.mark.parametrize("bits", [1, 2])
def test_words_of_few_bits_have_one_row(bits):
    """They are fragments of A of mma m16n8k128."""
    for step in range(4):
        for register, (field,) in enumerate(fields.fields_of(bits, step)):
            assert fields.step_words(bits, step)[field.word] % 4 == 2 * (register // 4) + register % 2


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"W{fmt.name}")
def test_codes_come_back(fmt):
    w = codes_of(fmt)
    prepared = w.prepare()
    prepared.check()
    assert prepared.words.shape == (2, 4, 2, fmt.bits, 128)
    np.testing.assert_array_equal(prepared.codes(), w.codes())
    np.testing.assert_array_equal(prepared.dequantize(), w.dequantize())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group_size", [16, 48, 128, 192])
def test_groups_come_back(group_size, gated):
    _, w = groups_of(BipolarFormat(3), group_size)
    prepared = w.prepare(gated=gated)
    prepared.check()
    np.testing.assert_array_equal(prepared.groups.scale, w.groups.scale)
    np.testing.assert_array_equal(prepared.groups.offset, w.groups.offset)
    np.testing.assert_array_equal(prepared.values(), w.values())


@pytest.mark.parametrize(("bits", "group_size"), [(6, None), (1, 48), (2, 64)])
def test_rows_are_those_of_the_array(bits, group_size):
    w = codes_of(BipolarFormat(bits)) if group_size is None else groups_of(BipolarFormat(bits), group_size)[1]
    ids = jnp.asarray([149, 0, 9, 9, 77, 127, 128], jnp.int32)
    np.testing.assert_array_equal(w.T.prepare().rows_at(ids), w.T.dequantize()[ids])


@pytest.mark.parametrize(
    ("bits", "group_size", "for_floats"),
    [(1, 32, False), (2, 16, False), (3, 16, False), (6, 32, False), (4, 64, True)],
)
def test_every_code_is_where_its_thread_looks(bits, group_size, for_floats):
    groups, w = groups_of(BipolarFormat(bits), group_size)
    prepared = w.prepare(for_floats=for_floats)
    found = codes_by_definition(np.asarray(prepared.words)[1, :, 1], bits)
    element = np.arange(128)
    step, half, t, e, p = np.unravel_index(element, (4, 2, 4, 2, 2))  # of positions
    by_float = 32 * step + 16 * half + 8 * p + 2 * t + e
    by_byte = element // 32 * 32 + 8 * (element % 4) + element % 32 // 4
    element = by_float if prepared.order == "floats" else by_byte
    filled = np.zeros((256, 256), int)
    filled[:N, :K] = groups.codes
    np.testing.assert_array_equal(found, filled[128:, 128 + element])
    assert prepared.order == ("floats" if group_size == 16 or for_floats else "bytes")


@pytest.mark.parametrize("group_size", [16, 48, 64, 128, 192])
def test_terms_are_those_of_every_row_and_chunk(group_size):
    """K ends within a group for every size."""
    groups, w = groups_of(BipolarFormat(2), group_size, k=300)
    prepared = w.prepare()
    chunk = 128 // prepared.chunks
    assert chunk == np.gcd(group_size, 128)
    row = np.arange(128)
    part, in_part = row // 16 % 4, row // 64 * 16 + row % 16
    for stage in range(3):
        scale, offset = (np.asarray(a)[part, in_part] for a in part_terms(np.asarray(prepared.terms)[1, :, stage]))
        for number in range(prepared.chunks):
            group = (128 * stage + number * chunk) // group_size
            if group < groups.scale.shape[1]:
                np.testing.assert_array_equal(scale[: N - 128, number], groups.scale[128:, group])
                np.testing.assert_array_equal(offset[: N - 128, number], groups.offset[128:, group].astype(int) + 128)
        assert not np.any(scale[N - 128 :])
        assert not np.any(offset[N - 128 :])


def test_terms_are_bytes_in_the_order_of_rows():
    """Word 2 r + b of part w has s and o + 128 of row 64 b + 16 w + r, then of the row 8 later."""
    groups, w = groups_of(BipolarFormat(2), 64, n=128, k=128)
    pairs = np.array(w.prepare().terms)[0, :, 0].view(np.uint8).reshape(4, 2, 8, 2, 2, 2)
    for chunk, part, r, b, p in np.ndindex(2, 4, 8, 2, 2):
        row = 64 * b + 16 * part + 8 * p + r
        assert pairs[part, chunk, r, b, p].tolist() == [groups.scale[row, chunk], int(groups.offset[row, chunk]) + 128]


def test_expanded_bytes_are_the_weights():
    groups, w = groups_of(BipolarFormat(5), 16, n=128, k=128)
    prepared = w.prepare()
    expanded = jax.jit(fields.expand_tile)(np.asarray(prepared.words)[0, :, 0], np.asarray(prepared.terms)[0, :, 0])
    np.testing.assert_array_equal(expanded, fields.positions_of(groups.values + 128, "floats"))


def test_a_tile_has_gates_and_their_values():
    fmt, half = BipolarFormat(3), 70
    w = codes_of(fmt, 2 * half, 40)
    prepared, codes = w.prepare(gated=True), np.asarray(w.codes())
    tiles = np.asarray(jax.jit(fields.unpack_fields, static_argnums=1)(prepared.words, "bytes")).reshape(2, 128, 128)
    np.testing.assert_array_equal(tiles[0, :64, :40], codes[:64])
    np.testing.assert_array_equal(tiles[0, 64:, :40], codes[half : half + 64])
    np.testing.assert_array_equal(tiles[1, :6, :40], codes[64:half])
    assert not tiles[1, 6:64].any()
    np.testing.assert_array_equal(prepared.codes(), codes)


def test_a_stack_of_layers_is_prepared_layer_by_layer():
    layers = [
        array_of_groups(random_groups(BipolarFormat(4), 130, 200, 64, seed), BipolarFormat(4), np.ones(130, np.float32))
        for seed in (0, 1)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    prepared = stack.prepare()
    prepared.check()
    assert prepared.shape == (2, 200, 130)
    for index, layer in enumerate(layers):
        one = layer.prepare()
        np.testing.assert_array_equal(prepared.words[index], one.words)
        np.testing.assert_array_equal(prepared.terms[index], one.terms)
    np.testing.assert_array_equal(prepared.codes(), stack.codes())
    np.testing.assert_array_equal(prepared.groups.offset, stack.groups.offset)


def test_bytes_of_a_weight():
    """Two bytes a group, and the words of the codes."""
    for group_size, bits in ((128, 4.125), (64, 4.25), (32, 4.5)):
        _, w = groups_of(BipolarFormat(4), group_size, 128, 1024)
        prepared = jax.eval_shape(lambda w: w.prepare(), w)
        assert 32 * (prepared.words.size + prepared.terms.size) == bits * 128 * 1024


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
def test_preparing_takes_no_more_memory_than_the_weights():
    n, k = 4096, 4096
    _, w = groups_of(BipolarFormat(4), 128, 8, 256)
    larger = dataclasses.replace(
        w,
        planes=jax.ShapeDtypeStruct((4, n, k // 32), jnp.uint32),
        scale=jax.ShapeDtypeStruct((n, 1), jnp.float32),
        row_sums=jax.ShapeDtypeStruct((n, 1), jnp.int32),
        contracted_size=k,
        groups=IntegerGroups(*(jax.ShapeDtypeStruct((n, k // 128), dtype) for dtype in (jnp.uint8, jnp.int8))),
    )
    program, _ = sm90_compile.compile_for_h200(lambda w: w.prepare(), larger)
    assert program.memory_analysis().temp_size_in_bytes <= n * k * 4 // 8 + 1024


def test_what_has_no_layout_is_an_error():
    fmt = BipolarFormat(4)
    _, w = groups_of(fmt, 24, 8, 48)
    with pytest.raises(ValueError, match="groups of a multiple of 16 elements can be prepared, not of 24"):
        w.prepare()
    two = np.ones((8, 2), np.float32)
    with pytest.raises(ValueError, match="groups of a multiple of 16 elements can be prepared, not of 24"):
        dataclasses.replace(w, groups=None, scale=two, row_sums=two.astype(np.int32)).prepare()
    with pytest.raises(ValueError, match="an even number of columns, not 7"):
        codes_of(fmt, 7, 32).prepare(gated=True)


def test_leaves_that_do_not_fit_are_an_error():
    prepared = codes_of(BipolarFormat(2)).prepare()
    with pytest.raises(ValueError, match=r"words \(1, 4, 2, 2, 128\) instead of \(2, 4, 2, 2, 128\)"):
        dataclasses.replace(prepared, words=prepared.words[:1]).check()

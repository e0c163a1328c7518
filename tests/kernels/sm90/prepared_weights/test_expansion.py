"""Threads expand prepared weights to the fragments of A that tensor cores read; simulated."""

from __future__ import annotations

import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALVES, Expansion
from bipolar_jax.packing.fields import positions_of
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import warpgroup_simulator
from tests.support.integer_products import random_codes

# Every width with codes alone, and every number of chunks in a stage; the fields of one do not depend on the other.
CASES = [*((bits, None) for bits in range(1, 9)), (1, 128), (2, 64), (3, 16), (4, 32), (5, 64), (6, 128), (6, 16)]


def rows_of_fragments(registers: list[np.ndarray]) -> np.ndarray:
    """Bytes [128, 32] by the PTX ISA's figure of A for m64nNk32, two blocks of 64 rows."""
    out = np.zeros((128, 32), np.uint8)
    thread = np.arange(128)
    row, k = 16 * (thread // 32) + thread % 32 // 4, 4 * (thread % 4)
    for number, register in enumerate(registers):
        block, high_k, low_row = number // 4, number % 4 // 2, number % 2
        for i in range(4):
            out[64 * block + row + 8 * low_row, 16 * high_k + k + i] = register[:, None].view(np.uint8)[:, i]
    return out


@pytest.mark.parametrize(("bits", "group_size"), CASES)
def test_threads_make_the_fragments(bits, group_size, monkeypatch):
    fmt = BipolarFormat(bits)
    ones = np.ones(128, np.float32)
    if group_size is None:
        codes = random_codes(fmt, 128, 128, 0)
        weights, expected = array_of_codes(codes, fmt, ones).prepare(), codes
    else:
        groups = random_groups(fmt, 128, 128, group_size)
        weights, expected = array_of_groups(groups, fmt, ones).prepare(), groups.values + 128
    expected = positions_of(expected, weights.order)
    words, terms = (None if a is None else np.array(a[0, :, 0]).reshape(-1, 4) for a in (weights.words, weights.terms))
    expansion = Expansion(bits, weights.chunks)
    warpgroup_simulator.install(monkeypatch)
    before = warpgroup_simulator.bank_conflicts[0]
    thread = ptx.thread_in_warpgroup()
    lane, warp = ptx.bits_of(thread, 31), ptx.shift_right(thread, 5)

    def part(array):
        return ptx.advance(ptx.pointer(array, ptx.SHARED), ptx.times(warp, array.nbytes // 4))

    for half in range(HALVES):
        fields = expansion.load_fields(part(words), lane, half)
        group_terms = [] if terms is None else expansion.load_terms(part(terms), lane, half)
        for step in range(2):
            registers = expansion.fragments(fields[step], group_terms, step)
            position = 32 * (2 * half + step)
            np.testing.assert_array_equal(rows_of_fragments(registers), expected[:, position : position + 32])
    assert warpgroup_simulator.bank_conflicts[0] == before

"""Prepared weights expanded to bytes are their values or signed codes: threads simulated, interpreted, and compiled."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.weight_prep.expand_floats import _STAGES, ByteExpansion, FloatRows, expand_bytes
from tests.packing.float_groups import float_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

# Every width; ragged n and K, gates and values, the natural order.
CASES = [(BipolarFormat(bits), 128, 70, 300, bits % 2 == 0) for bits in range(1, 9)]
CASES += [(BipolarFormat(4), 16, 130, 128, False), (TERNARY, 32, 20, 100, False)]
with_every_case = pytest.mark.parametrize(
    ("fmt", "group_size", "n", "k", "gated"), CASES, ids=lambda value: getattr(value, "name", None)
)


def expected_of(w) -> np.ndarray:
    codes, fmt = np.asarray(w.codes(), np.int64), w.format
    return 2 * codes - fmt.max_value if fmt.max_value <= 127 else codes - 128


@with_every_case
def test_threads_write_the_values(fmt, group_size, n, k, gated, monkeypatch):
    w = float_groups(fmt, n, k, group_size, "scales")
    prepared, expected = w.prepare(gated=gated), expected_of(w)
    tiles, _, stages, _, _ = prepared.words.shape
    rows = FloatRows(ByteExpansion(fmt), n, stages, gated, prepared.natural_order)
    out, words = np.zeros((n, stages * 128), np.int8), np.array(prepared.words)
    warpgroup_simulator.install(monkeypatch)
    for tile in range(tiles):
        for first in range(0, stages, _STAGES):
            rows.expand_block(*map(warpgroup_simulator.int32, (tile, first)), words, [], out)
    np.testing.assert_array_equal(out[:, :k], expected)


@with_every_case
@pytest.mark.sample(1)
def test_blocks_write_what_is_theirs(fmt, group_size, n, k, gated):
    w = float_groups(fmt, n, k, group_size, "offsets")
    out = expand_bytes(w.prepare(gated=gated), interpret=plgpu.InterpretGPUParams(detect_races=True))
    np.testing.assert_array_equal(np.asarray(out)[:, :k], expected_of(w))
    assert not races_found()


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize(("bits", "group_size", "gated"), [(4, 128, True), (7, 16, False), (8, 128, False)])
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, gated):
    w = float_groups(BipolarFormat(bits), 256, 384, group_size, "scales").prepare(gated=gated)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), w)
    _, report = sm90_compile.compile_for_h200(expand_bytes, shapes)
    assert report.spill_bytes == report.stack_bytes == 0

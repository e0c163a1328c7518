"""Prepared weights with float scales of groups expanded to float16: threads simulated, interpreted, and compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.weight_prep.expand_floats import _STAGES
from bipolar_jax.kernels.sm90.weight_prep.expand_scaled import ScaledExpansion, ScaledRows, expand_scaled
from tests.packing.float_groups import float_groups, numbers_of
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

# Ragged n and K, gates and values, groups that span stages, the natural order.
CASES = [(4, 32, 130, 300, False), (8, 64, 70, 128, True), (3, 48, 20, 200, False), (1, 192, 132, 300, True)]
with_every_case = pytest.mark.parametrize(("bits", "group_size", "n", "k", "gated"), CASES)


def operands(bits, group_size, n, k):
    w = float_groups(BipolarFormat(bits), n, k, group_size, "offsets")
    return w, np.asarray(w.scale), np.asarray(w.offset)


def assert_rounded(found: np.ndarray, w) -> None:
    """Numbers are those of the weights, rounded once to float16, behind two roundings to float32."""
    numbers = numbers_of(w)
    size = np.abs(numbers) + 2 * np.abs(np.asarray(w.offset)).max()
    assert np.all(np.abs(found[:, : w.contracted_size] - numbers) <= 2.0**-11 * np.abs(numbers) + 2.0**-23 * size)


@with_every_case
def test_threads_write_the_numbers(bits, group_size, n, k, gated, monkeypatch):
    w, scale, offset = operands(bits, group_size, n, k)
    prepared = w.prepare(gated=gated, float_terms="offsets")
    tiles, _, stages, _, _ = prepared.words.shape
    expansion = ScaledExpansion(w.format, prepared.chunks)
    rows = ScaledRows(expansion, n, stages, gated, prepared.natural_order, group_size, scale.shape[1])
    out, words = np.zeros((n, stages * 128), np.float16), np.array(prepared.words)
    warpgroup_simulator.install(monkeypatch)
    for tile in range(tiles):
        for first in range(0, stages, _STAGES):
            rows.expand_block(*map(warpgroup_simulator.int32, (tile, first)), words, [scale.copy(), offset.copy()], out)
    assert_rounded(out.astype(np.float64), w)


@with_every_case
@pytest.mark.sample(1)
def test_blocks_write_what_is_theirs(bits, group_size, n, k, gated):
    w, scale, offset = operands(bits, group_size, n, k)
    prepared = w.prepare(gated=gated, float_terms="offsets")
    out = expand_scaled(prepared, scale, offset, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert out.dtype == jnp.float16
    assert_rounded(np.asarray(out, np.float64), w)
    assert not races_found()


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize(("bits", "group_size", "gated"), [(4, 32, True), (7, 16, False)])
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, gated):
    w, *terms = operands(bits, group_size, 256, 384)
    prepared = w.prepare(gated=gated, float_terms="offsets")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (prepared, *terms))
    _, report = sm90_compile.compile_for_h200(expand_scaled, *shapes)
    assert report.spill_bytes == report.stack_bytes == 0

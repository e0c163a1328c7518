"""Prepared weights expanded to 16-bit floats are their integer values: threads simulated, interpreted, and compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.kernels.sm90.weight_prep.expand_floats import _STAGES, FloatRows, expand_floats
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
# Every width, alone or with groups; every number of chunks; gates and values; ragged n and K.
CASES = [
    (BipolarFormat(1), 128, 130, 300, False, jnp.bfloat16),
    (BipolarFormat(2), 64, 140, 128, True, jnp.bfloat16),
    (BipolarFormat(3), 16, 70, 256, False, jnp.float16),
    (BipolarFormat(4), 32, 256, 200, True, jnp.bfloat16),
    (BipolarFormat(4), 128, 128, 640, False, jnp.float16),
    (BipolarFormat(5), 48, 66, 150, True, jnp.bfloat16),
    (BipolarFormat(6), 192, 100, 390, False, jnp.bfloat16),
    (BipolarFormat(7), None, 20, 100, False, jnp.bfloat16),
    (BipolarFormat(8), None, 20, 300, False, jnp.bfloat16),
    (BipolarFormat(8), None, 20, 100, False, jnp.float16),
    (TERNARY, 64, 20, 100, False, jnp.bfloat16),
    (TERNARY, None, 20, 100, False, jnp.bfloat16),
]
with_every_case = pytest.mark.parametrize(
    ("fmt", "group_size", "n", "k", "gated", "dtype"), CASES, ids=lambda value: getattr(value, "name", None)
)


def weights(fmt: BipolarFormat, group_size: int | None, n: int, k: int):
    """A `BipolarArray` of unit scales, and its integer values."""
    ones = np.ones(n, np.float32)
    if group_size is None:
        codes = random_codes(fmt, n, k, 1)
        return array_of_codes(codes, fmt, ones), 2 * codes.astype(np.int64) - fmt.max_value
    groups = random_groups(fmt, n, k, group_size)
    return array_of_groups(groups, fmt, ones), groups.values


@with_every_case
def test_threads_write_the_values(fmt, group_size, n, k, gated, dtype, monkeypatch):
    w, values = weights(fmt, group_size, n, k)
    prepared = w.prepare(gated=gated)
    tiles, _, stages, _, _ = prepared.words.shape
    expansion = FloatExpansion(fmt, prepared.chunks, FLOATS[PTX_TYPES[jnp.dtype(dtype).name]])
    rows = FloatRows(expansion, n, stages, gated, prepared.natural_order)
    out = np.full((n, stages * 128), np.nan, dtype)
    words, terms = (None if a is None else np.array(a) for a in (prepared.words, prepared.terms))
    with monkeypatch.context() as patch:
        warpgroup_simulator.install(patch)
        for tile in range(tiles):
            for first in range(0, stages, _STAGES):
                rows.expand_block(
                    *map(warpgroup_simulator.int32, (tile, first)), words, [] if terms is None else [terms], out
                )
    assert np.isfinite(out.astype(np.float32)).all()
    np.testing.assert_array_equal(out[:, :k].astype(np.int64), values)


@with_every_case
@pytest.mark.sample(2)
def test_blocks_write_what_is_theirs(fmt, group_size, n, k, gated, dtype):
    w, values = weights(fmt, group_size, n, k)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = np.asarray(expand_floats(w.prepare(gated=gated), dtype, interpret=params))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[:, :k].astype(np.int64), values)
    assert not races_found()


@needs_compiler
@pytest.mark.parametrize(("bits", "group_size", "gated"), [(4, 128, True), (6, 16, False), (8, None, False)])
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, gated):
    w, _ = weights(BipolarFormat(bits), group_size, 256, 384)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), w.prepare(gated=gated))
    _, report = sm90_compile.compile_for_h200(lambda w: expand_floats(w, jnp.bfloat16), shapes)
    assert report.spill_bytes == report.stack_bytes == 0

"""Prepared weights and integer groups on Hopper: whole products of `bj.matmul`, plans, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.backend import expanded_planning, operations
from bipolar_jax.kernels.sm90.backend.expanded_planning import (
    EXPANDED_CANDIDATES,
    fitted,
    plan_expanded,
    plan_many_tokens,
)
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops import Activation
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support.integer_products import normal, random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

A8 = BipolarFormat(8)
GATE = Activation("silu", gated=True)


def groups(n: int, k: int, bits: int = 4, group_size: int = 32):
    fmt = BipolarFormat(bits)
    return array_of_groups(random_groups(fmt, n, k, group_size), fmt, np.full(n, 2.0**-10, np.float32))


def codes(n: int, k: int, bits: int):
    fmt = BipolarFormat(bits)
    return array_of_codes(random_codes(fmt, n, k, 0), fmt, np.full(n, 2.0**-10, np.float32))


@pytest.mark.parametrize(
    ("m", "w", "gated", "activation", "residual"),
    [
        (70, groups(40, 96), None, None, True),  # laid out within the call
        (65, groups(140, 96), True, None, True),  # the columns of tiles put in order
        (3, groups(140, 96), True, GATE, True),
        (3, codes(40, 96, 7), False, GATE, False),  # the gates are a step of their own
    ],
    ids=["packed groups", "gated without activation", "gated", "activation without gates"],
)
@pytest.mark.sample(1)
def test_the_whole_product_is_that_of_xla(m, w, gated, activation, residual):
    x, bias = jnp.asarray(normal(m, 96)), jnp.asarray(normal(w.shape[-1]))
    columns = w.shape[-1] // (2 if activation else 1)
    options = {
        "bias": bias,
        "activation": activation,
        "residual": jnp.asarray(normal(m, columns)) if residual else None,
    }
    prepared = w if gated is None else w.prepare(gated=gated)
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found = bj.matmul(x, prepared, 8, implementation="sm90", **options)
    expected = np.asarray(bj.matmul(x, w, 8, implementation="xla", **options))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert not races_found()


@pytest.mark.parametrize(("m", "gated"), [(65, None), (65, True), (3, True), (20, None)])
@pytest.mark.sample(2)
def test_integer_products_have_one_sum_for_all_groups(m, gated):
    w, x = groups(140, 96), random_codes(A8, m, 96, 1)
    expected = (2 * x.astype(int) - 255) @ np.asarray(w.values(), int)
    with interpreted(plgpu.InterpretGPUParams()):
        found = operations.integer_matmul(jnp.asarray(x), w if gated is None else w.prepare(gated=gated), A8)
    assert (found.shape, found.dtype) == ((m, 140, 1), jnp.int32)
    np.testing.assert_array_equal(found[..., 0], expected)


def test_plans_are_explained():
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2048, 4096), (4096, 14336)))
    w = jax.eval_shape(lambda kernel: bj.quantize(kernel, 4, 0, 128, scales="integer"), kernel)
    with interpreted(plgpu.InterpretGPUParams()):
        packed, prepared = bj.explain(x, w, 8), bj.explain(x, jax.eval_shape(lambda w: w.prepare(), w), 8)
    for explained in (packed, prepared):
        assert explained.implementation == "sm90"
        assert explained.kernel == "int8 tensor cores, weights of 4 bits in integer groups of 128 expanded in registers"
        assert explained.tiling == EXPANDED_CANDIDATES[0]
    assert prepared.reason == "estimated from tile sizes"
    with interpreted(plgpu.InterpretGPUParams()):
        few = bj.explain(jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), w, 8)
    assert (few.implementation, few.kernel) == ("sm90", packed.kernel)
    assert few.reason.startswith("16 tokens: bound by reading the weights; lays the weights out")
    assert isinstance(few.tiling, FewTokensTiling)
    assert packed.reason.endswith("; lays the weights out in every call, prepare_for_inference once")


@pytest.mark.parametrize(
    ("m", "n", "k", "tile_m", "schedule", "splits"),
    [
        (1024, 4096, 14336, 128, "split_n", 1),  # 128 tiles
        (777, 3584, 18944, 96, "split_n", 1),  # 126 of 96 tokens, 98 of 128
        (1728, 3072, 4096, 80, "split_n", 1),  # 264, two for each block
        (134, 5120, 28672, 80, "split_n", 3),  # 120 parts of K of 40
        (300, 4096, 14336, 80, "alternate", 1),
        (512, 4096, 4096, 128, "alternate", 1),  # 64 tiles of both consumers, or 128 of one
        (128, 4096, 14336, 128, "alternate", 4),  # 32 tiles
        (192, 11264, 4096, 64, "split_n", 1),
    ],
)
def test_few_tiles_are_made_smaller_or_split_along_k(m, n, k, tile_m, schedule, splits):
    w = jax.eval_shape(lambda: dataclasses.replace(codes(n, 32, 4), contracted_size=k).prepare())
    tiling = plan_expanded(m, w, jnp.bfloat16).tiling
    assert (tiling.tile_m, tiling.schedule, tiling.splits) == (tile_m, schedule, splits)
    # Heads are no matrix that XLA could add up; gated weights have columns in the order of tiles.
    assert plan_many_tokens(m, w, jnp.bfloat16).tiling.splits == 1
    assert plan_expanded(m, dataclasses.replace(w, gated=True), jnp.bfloat16).tiling.splits == 1


@pytest.mark.parametrize(
    ("m", "n", "k", "kind", "splits"),
    [
        (64, 28672, 4096, Tiling, 1),
        (64, 4096, 14336, Tiling, 4),
        (64, 4096, 4096, Tiling, 4),
        (64, 6144, 4096, Tiling, 2),
        (32, 4096, 14336, Tiling, 8),
        (48, 28672, 4096, Tiling, 1),
        (24, 28672, 4096, FewTokensTiling, None),
        (16, 4096, 14336, FewTokensTiling, None),
    ],
)
def test_tiles_serve_from_17_tokens_on_where_they_are_quicker(m, n, k, kind, splits):
    w = jax.eval_shape(lambda: bj.quantize(jnp.zeros((k, n)), 4, 0, group_size=128, scales="integer").prepare())
    tiling = plan_expanded(m, w, jnp.dtype(jnp.bfloat16)).tiling
    assert isinstance(tiling, kind)
    assert splits is None or tiling.splits == splits


def test_tilings_fit_shared_memory():
    """Bytes of 8 bits, and terms of every 16 elements, for outputs of 32 bits."""
    for w in (codes(128, 128, 8), groups(128, 128, 6, 16)):
        for tiling in expanded_planning.whole_candidates(1000, is_float=False):
            expanded_planning.ExpandedProblem(
                1, 128, None, fitted(tiling, w, 4), w_bits=w.bits, chunks=w.prepare().chunks
            ).check(4)
    assert fitted(EXPANDED_CANDIDATES[0], codes(128, 128, 8), 4).slots == 3


def test_what_is_not_served_is_said():
    odd, x = groups(64, 96, group_size=24), jnp.ones((2, 96), jnp.bfloat16)
    with interpreted(plgpu.InterpretGPUParams()):
        for w, a_bits, message in ((odd, 8, "groups of a multiple of 16 elements can be prepared, not of 24"),):
            explained = bj.explain(x, w, a_bits)
            assert explained.implementation == "xla"
            assert message in explained.passed_over["sm90"]
            with pytest.raises(Unsupported, match=message):
                bj.matmul(x, w, a_bits, implementation="sm90")

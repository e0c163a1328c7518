"""Prompts' heads on Hopper: split, rotated and cached as by XLA, with no races, compiled without spills."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.rotation import LARGEST_AMPLITUDE, fixed_point_tables
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words, expand_planes
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.projections.prompt_projection import project_heads
from bipolar_jax.models.blocks.attention import rotated_heads
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.packing.words import pack_codes
from tests.support.integer_products import expected_product, random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("clean_interpreter")]

LAYERS, LAYER, K = 2, 1, 70


@dataclasses.dataclass(frozen=True)
class Case:
    """One product of prompts."""

    tiling: Tiling
    batch: int = 1
    length: int = 70
    queries: int = 1
    keys: int = 1
    size: int = 64
    capacity: int = 70
    kind: str = "planes"
    dtype: type = jnp.bfloat16
    rope: bool = True
    bias: bool = False
    zeros: bool = False  # of tokens, and offsets of columns

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(self.queries, self.keys, self.size, self.capacity)

    def make(self):
        """Codes and scales of tokens and weights, zeros and offsets, bias, tables; a cache in which something is."""
        rng = np.random.default_rng(0)
        m, n, half = self.batch * self.length, self.layout.columns, self.size // 2
        codes = random_codes(BipolarFormat(2), m, K, 0), random_codes(BipolarFormat(1), n, K, 1)
        scales = [jnp.asarray(0.5 + rng.random(size), jnp.float32) for size in (m, n)]
        zero_codes = jnp.asarray(rng.integers(0, 4, m) if self.zeros else np.zeros(m), jnp.int32)
        offsets = jnp.asarray(rng.standard_normal(n), jnp.float32) if self.zeros else None
        bias = jnp.asarray(20 * rng.standard_normal(n), jnp.float32) if self.bias else None
        angles = jnp.asarray(rng.standard_normal((1, self.length, half)), jnp.float32)
        # As they are in multiples of 2^-14: what the kernel rotates by.
        tables = tuple(jnp.round(f(angles) * 2**14) / 2**14 for f in (jnp.cos, jnp.sin)) if self.rope else None
        shape = (LAYERS, self.batch, self.keys, self.capacity, self.size)
        kept = [jnp.full(shape, fill, self.dtype) for fill in (jnp.nan, 7)]
        return codes, scales, (zero_codes, offsets), bias, tables, KVCache(*kept, jnp.full(self.batch, self.length))


CASES = {
    "chunks beyond the last head": Case(Tiling(128, 128, "alternate", slots=3), length=200, capacity=330, keys=2),
    "sequences": Case(Tiling(64, 64, "alternate", slots=2), batch=3, length=67, queries=2, capacity=131),
    "whole tiles": Case(Tiling(64, 128, "alternate", slots=2), batch=2, length=128, size=128, capacity=192),
    "two heads": Case(Tiling(128, 128, "alternate", slots=4), length=130, size=128, queries=2, capacity=131),
    "bytes": Case(Tiling(64, 128, "alternate", slots=2), batch=2, length=65, size=128, kind="int8", capacity=128),
    "no rotation": Case(
        Tiling(128, 128, "alternate", slots=4), batch=2, length=100, rope=False, bias=True, queries=2, capacity=300
    ),
    "clusters, float16": Case(
        Tiling(64, 64, "split_n", slots=3, cluster_m=2, cluster_n=2),
        queries=3,
        dtype=jnp.float16,
        bias=True,
        capacity=200,
    ),
    "zeros and offsets": Case(
        Tiling(64, 128, "alternate", slots=2), length=90, size=128, capacity=100, zeros=True, bias=True
    ),
    "bytes, float16": Case(
        Tiling(64, 128, "split_m", slots=2),
        size=128,
        dtype=jnp.float16,
        rope=False,
        kind="int8",
        bias=True,
        capacity=500,
    ),
}


def project(case: Case, blocks: int):
    """By the kernel, and by numpy and the functions of the models."""
    codes, scales, (zero_codes, offsets), bias, tables, cache = case.make()
    a_format, w_format = BipolarFormat(2), BipolarFormat(1)
    weights = pack_codes(jnp.asarray(codes[1]), w_format)
    rest = 3  # the quantizer's vectors are longer than there are tokens, whatever is there
    pad = lambda vector: jnp.pad(vector, (0, rest), constant_values=jnp.asarray(1e9, vector.dtype))  # noqa: E731
    sums = [jnp.asarray(each.sum(axis=1), jnp.int32) for each in codes]
    found = project_heads(
        code_words(jnp.asarray(codes[0]), a_format, case.kind),
        weights if case.kind == "planes" else expand_planes(weights, w_format),
        TokenTerms(pad(sums[0]), pad(zero_codes), pad(scales[0])),
        ColumnTerms(code_sums=sums[1], scale=scales[1], offset=offsets, bias=bias),
        Recovery(case.kind, a_format, w_format, K, with_zero=case.zeros),
        case.tiling,
        case.layout,
        cache.keys,
        cache.values,
        jnp.int32(LAYER),
        None if tables is None else fixed_point_tables(tables, 1),
        length=case.length,
        blocks=blocks * case.tiling.cluster_size,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    product = expected_product(codes[0], a_format, codes[1], w_format, None)[..., 0]
    if case.zeros:
        steps = a_format.values(codes[0]).astype(np.int64) - a_format.values(np.asarray(zero_codes))[:, None]
        values = w_format.values(codes[1]).astype(np.int64)
        product = steps @ values.T + np.outer(steps.sum(axis=1), np.asarray(offsets) / scales[1])
    product = product * np.outer(*scales) + (0 if bias is None else np.asarray(bias))
    heads = jnp.asarray(product, jnp.float32).reshape(case.batch, case.length, -1, case.size)
    expected = [array.astype(case.dtype) for array in rotated_heads((heads,), case.keys, tables)]
    cache = cache.write_prompts(LAYER, *expected[1:])
    return found, [*expected, cache.keys, cache.values]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.sample(1)
def test_heads_are_those_of_xla(case):
    for found, expected in zip(*project(case, blocks=2), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        found, expected = (np.asarray(array, np.float32) for array in (found, expected))
        # A sum rounded otherwise in float32 may be rounded to the next number of 16 bits, near 0 by little more.
        np.testing.assert_allclose(found, expected, rtol=float(jnp.finfo(case.dtype).eps), atol=1e-4)
    assert not races_found()


@pytest.mark.parametrize(("slots", "fit"), [(6, 1), (5, 3)])
def test_every_half_of_a_head_needs_a_slot(slots, fit):
    tiling = Tiling(128, 128, "alternate", slots=slots)
    with pytest.raises(ValueError, match=f"for {fit} of 4 halves of heads: use fewer slots"):
        project(Case(tiling, size=128), blocks=1)


def test_fixed_point_is_within_half_a_step():
    numbers = np.linspace(-LARGEST_AMPLITUDE, LARGEST_AMPLITUDE, 70 * 32, dtype=np.float32).reshape(1, 70, 32)
    exact = numbers, -numbers
    for table, numbers in zip(fixed_point_tables(tuple(map(jnp.asarray, exact)), 128), exact, strict=True):
        assert (table.shape, table.dtype) == ((128, 32), jnp.int16)
        assert not np.any(table[70:])
        assert np.abs(np.asarray(table[:70], np.float64) / 2**14 - numbers[0]).max() <= 2**-15
    with pytest.raises(ValueError, match="got tables of 2"):
        fixed_point_tables((jnp.zeros((2, 70, 32)),) * 2, 128)

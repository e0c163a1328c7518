"""Queries, keys and values of prompts: split, rotated and cached as by the functions of the models."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.kernels.semantics.prologue import RMSNorm
from bipolar_jax.kernels.semantics.rotation import fixed_point_tables
from bipolar_jax.models.blocks.attention import rotated_heads
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.ops.dispatch import BACKENDS
from bipolar_jax.packing.float_terms import FloatTerms
from tests.gpu.cases.operands import EPS, assert_within, exact_tokens, generator, numbers_of, random_weights, rounding
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.float_groups import float_groups
from tests.packing.integer_groups import array_of_groups, random_groups

SM90 = BACKENDS["sm90"]

_LAYERS, _LAYER = 2, 1
# Tables are rounded to multiples of 2^-14: what the kernel rotates by.
_TABLE_STEP = 2.0**-14
_TILE_ROWS = 128
_NORM_EPS = 1e-3
# Weights in float groups of no multiple of _LONG are rounded to float16.
_LONG, _FLOAT16 = 64, 2.0**-11


@dataclasses.dataclass(frozen=True)
class Prompts:
    """One product of prompts; all shapes are those of the operation.

    Weights with a group size have integer groups, or float ones of this form of terms.
    """

    w_bits: int
    a_bits: int
    batch: int
    length: int
    queries: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: type = ml_dtypes.bfloat16
    rope: bool = True
    bias: bool = False
    offsets: bool = False
    group_size: int | None = None
    prepared: bool = False
    k: int = 200
    float_terms: FloatTerms | None = None
    head_norms: bool = False
    angles: tuple[float, float] = (-np.pi, np.pi)

    @property
    def name(self) -> str:
        options = [name for name in ("rope", "bias", "offsets", "prepared", "head_norms") if getattr(self, name)]
        heads = f"{self.queries}/{self.kv_heads} heads of {self.head_dim}"
        sizes = f"{self.batch} prompts of {self.length} in {self.capacity}"
        groups = (
            ""
            if self.group_size is None
            else f"g{self.group_size}{'i' if self.float_terms is None else f'f {self.float_terms}'}"
        )
        return " ".join(
            [f"W{self.w_bits}A{self.a_bits}{groups}, {sizes}, {heads},", np.dtype(self.dtype).name, *options]
        )

    def trial(self) -> Trial:
        rng, a_format = generator(*(self.batch, self.length, self.queries, self.a_bits)), BipolarFormat(self.a_bits)
        n = (self.queries + 2 * self.kv_heads) * self.head_dim
        x, size = exact_tokens(rng, self.batch * self.length, self.k, a_format, self.dtype)
        w, w_hat, w_size = self._weights(rng, n)
        bias = rng.normal(size=n).astype(np.float32) if self.bias else None
        angles = rng.uniform(*self.angles, (1, self.length, self.head_dim // 2))
        tables = tuple(np.round(f(angles) / _TABLE_STEP) * _TABLE_STEP for f in (np.cos, np.sin)) if self.rope else None
        tables = None if tables is None else tuple(table.astype(np.float32) for table in tables)
        shape = (_LAYERS, self.batch, self.kv_heads, self.capacity, self.head_dim)
        keys, values = (np.full(shape, fill, self.dtype) for fill in (np.nan, 7))

        product = x.astype(np.float64) @ w_hat + (0 if bias is None else bias)
        # Of the product, of the two terms of a rotation, and of its sum.
        error = 14 * EPS * float((size @ w_size + (0 if bias is None else np.abs(bias))).max())
        if self.float_terms is not None and self.group_size % _LONG:
            error += _FLOAT16 * float((np.abs(x.astype(np.float64)) @ w_size).max())
        heads, norms = product.reshape(self.batch, self.length, -1, self.head_dim), None
        if self.head_norms:
            norms = tuple(RMSNorm(rng.uniform(0.5, 1.5, self.head_dim).astype(np.float32), _NORM_EPS) for _ in "qk")
            heads, largest = self._normalized(heads, norms)
            error = 4 * largest * error + 8 * EPS * float(np.abs(heads).max())
        expected = self._expected(heads, tables, keys, values)

        def check(found):
            for got, wanted in zip(found, expected, strict=True):
                if got.dtype != self.dtype:
                    raise AssertionError(f"dtype {got.dtype}, expected {np.dtype(self.dtype)}")
                unwritten = np.isnan(wanted)
                np.testing.assert_array_equal(np.isnan(np.asarray(got, np.float32)), unwritten)
                got, wanted = np.where(unwritten, 0, np.asarray(got, np.float64)), np.where(unwritten, 0, wanted)
                assert_within(got, wanted, error + rounding(self.dtype, wanted))

        def project(x, w, bias, keys, values, layer, tables, norms):
            fixed = None if tables is None else fixed_point_tables(tables, _TILE_ROWS)
            w = w.prepare(float_terms=self.float_terms) if self.prepared else w
            return SM90.prompt_heads(x, w, a_format, bias, None, keys, values, layer, fixed, norms)

        x = x.reshape(self.batch, self.length, self.k)
        return one_program(project, (x, w, bias, keys, values, np.int32(_LAYER), tables, norms), check)

    def _normalized(self, heads: np.ndarray, norms: tuple[RMSNorm, RMSNorm]) -> tuple[np.ndarray, float]:
        """The heads in float64, those of queries and keys normalized; and the largest factor on a number."""
        count = self.queries + self.kv_heads
        gains = np.repeat([norm.gain for norm in norms], [self.queries, self.kv_heads], axis=0)
        factors = gains / np.sqrt(np.mean(heads[:, :, :count] ** 2, axis=-1, keepdims=True) + _NORM_EPS)
        normalized = np.concatenate([heads[:, :, :count] * factors, heads[:, :, count:]], axis=2)
        return normalized, max(1.0, float(factors.max()))

    def _weights(self, rng: np.random.Generator, n: int) -> tuple[BipolarArray, np.ndarray, np.ndarray]:
        """Weights [k, n], their numbers and the sizes of these in float64."""
        w_format = BipolarFormat(self.w_bits)
        if self.group_size is None:
            w = random_weights(rng, n, self.k, w_format, None, self.offsets)
            return w, *numbers_of(w)
        if self.float_terms is not None:
            w = float_groups(w_format, n, self.k, self.group_size, self.float_terms)
            w = dataclasses.replace(w, scale=w.scale / 16, offset=None if w.offset is None else w.offset / 16)
            w_hat, w_size = numbers_of(w)
            # A code times S and Z times S are up to twice a value each.
            return w, w_hat, 2 * np.max(w_size, axis=0, keepdims=True) * np.ones_like(w_size)
        groups = random_groups(w_format, n, self.k, self.group_size, int(rng.integers(1 << 30)))
        scale = (rng.uniform(0.5, 1.5, n) / (128 * np.sqrt(self.k))).astype(np.float32)
        numbers = scale.astype(np.float64) * groups.values.T
        return array_of_groups(groups, w_format, scale), numbers, np.abs(numbers)

    def _expected(self, product, tables, keys, values) -> list[np.ndarray]:
        """q, k, v, keys and values in float64, rounded to the dtype."""
        with jax.default_device(jax.devices("cpu")[0]):
            heads = rotated_heads((jnp.asarray(product, jnp.float32),), self.kv_heads, tables)
            heads = [head.astype(self.dtype) for head in heads]
            cache = KVCache(jnp.asarray(keys), jnp.asarray(values), jnp.full(self.batch, self.length))
            cache = cache.write_prompts(_LAYER, *heads[1:])
            return [np.asarray(array, np.float64) for array in (*heads, cache.keys, cache.values)]


def cases() -> list[Case]:
    half = np.float16
    prompts = [
        Prompts(1, 1, 1, 200, 4, 4, 128, 330),
        Prompts(2, 2, 3, 67, 6, 2, 64, 131, bias=True),
        Prompts(4, 8, 3, 130, 8, 2, 128, 192, offsets=True),
        Prompts(4, 8, 1, 300, 32, 8, 128, 320),
        Prompts(8, 8, 2, 65, 9, 3, 64, 128, half, bias=True, offsets=True),
        Prompts(3, 2, 2, 100, 4, 4, 128, 300, rope=False, bias=True),
        Prompts(1, 8, 3, 257, 28, 4, 128, 320, bias=True),
        Prompts(2, 4, 1, 70, 3, 1, 64, 70, half),
        Prompts(1, 1, 2, 128, 32, 32, 128, 128, rope=False),
        Prompts(5, 8, 3, 90, 4, 2, 64, 100, offsets=True, bias=True),
        Prompts(8, 1, 1, 1000, 4, 2, 128, 1088),
        Prompts(2, 3, 3, 513, 15, 5, 64, 640, half),
        Prompts(4, 8, 3, 130, 8, 2, 128, 192, group_size=128, prepared=True),
        Prompts(4, 8, 1, 2048, 32, 8, 128, 2100, group_size=128, prepared=True, k=1000),
        Prompts(4, 8, 2, 777, 32, 8, 128, 800, half, group_size=64, prepared=True, bias=True),
        Prompts(8, 8, 3, 257, 28, 4, 128, 320, offsets=True, bias=True, prepared=True),
        Prompts(2, 8, 2, 65, 9, 3, 64, 128, half, group_size=64, prepared=True, bias=True),
        Prompts(4, 4, 1, 1100, 32, 8, 64, 1200, offsets=True, prepared=True, bias=True),
        Prompts(1, 2, 3, 513, 15, 5, 64, 640, group_size=32, prepared=True),
        Prompts(3, 8, 2, 100, 4, 4, 128, 300, rope=False, bias=True, group_size=16),
        Prompts(5, 8, 1, 70, 3, 1, 64, 70, group_size=96),
        Prompts(6, 1, 2, 128, 4, 2, 64, 192, rope=False, prepared=True),
        Prompts(4, 8, 1, 2048, 32, 8, 128, 2100, group_size=128, prepared=True, float_terms="offsets", k=1000),
        Prompts(4, 8, 3, 130, 8, 2, 128, 192, half, group_size=128, prepared=True, float_terms="zeros", bias=True),
        Prompts(8, 5, 2, 67, 9, 3, 64, 128, group_size=256, prepared=True, float_terms="scales", k=700),
        Prompts(4, 8, 2, 777, 32, 8, 128, 800, group_size=128, prepared=True, head_norms=True, k=1000),
        Prompts(2, 8, 3, 130, 5, 1, 128, 192, half, group_size=64, prepared=True, bias=True, head_norms=True),
        Prompts(4, 8, 1, 300, 16, 8, 128, 320, group_size=64, prepared=True, float_terms="offsets", head_norms=True),
        Prompts(4, 8, 2, 777, 32, 8, 128, 800, group_size=32, prepared=True, float_terms="offsets", k=1000),
        Prompts(4, 8, 3, 130, 8, 2, 64, 192, half, group_size=16, prepared=True, float_terms="zeros", bias=True),
        Prompts(4, 8, 1, 300, 16, 8, 128, 320, group_size=32, prepared=True, float_terms="scales", head_norms=True),
    ]
    return [Case(each.name, each.trial) for each in prompts]


def small() -> dict[str, Case]:
    prompts = Prompts(2, 2, 2, 67, 2, 1, 64, 131, bias=True, k=70)
    expanded = [Prompts(4, 8, 2, 67, 2, 1, size, 131, group_size=32, prepared=True, k=70) for size in (64, 128)]
    normalized = Prompts(4, 8, 2, 67, 2, 1, 128, 131, group_size=32, prepared=True, k=70, head_norms=True)
    return {
        "heads, normalized": Case("heads, normalized", normalized.trial),
        "heads": Case("heads", prompts.trial),
        "heads of 64, expanded": Case("heads of 64, expanded", expanded[0].trial),
        "heads of 128, expanded": Case("heads of 128, expanded", expanded[1].trial),
    }

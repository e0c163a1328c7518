"""Queries, keys and values of prompts: split, rotated and cached as by the functions of the models."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.rotation import fixed_point_tables
from bipolar_jax.models.blocks.attention import rotated_heads
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import EPS, assert_within, exact_tokens, generator, numbers_of, random_weights, rounding
from tests.gpu.trial import Case, Trial, one_program

SM90 = BACKENDS["sm90"]

_LAYERS, _LAYER = 2, 1
# Tables are rounded to multiples of 2^-14: what the kernel rotates by.
_TABLE_STEP = 2.0**-14
_TILE_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Prompts:
    """One product of prompts; all shapes are those of the operation."""

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
    k: int = 200

    @property
    def name(self) -> str:
        options = [name for name in ("rope", "bias", "offsets") if getattr(self, name)]
        heads = f"{self.queries}/{self.kv_heads} heads of {self.head_dim}"
        sizes = f"{self.batch} prompts of {self.length} in {self.capacity}"
        return " ".join([f"W{self.w_bits}A{self.a_bits}, {sizes}, {heads},", np.dtype(self.dtype).name, *options])

    def trial(self) -> Trial:
        rng, a_format = generator(*(self.batch, self.length, self.queries, self.a_bits)), BipolarFormat(self.a_bits)
        n = (self.queries + 2 * self.kv_heads) * self.head_dim
        x, size = exact_tokens(rng, self.batch * self.length, self.k, a_format, self.dtype)
        w = random_weights(rng, n, self.k, BipolarFormat(self.w_bits), None, self.offsets)
        bias = rng.normal(size=n).astype(np.float32) if self.bias else None
        angles = rng.uniform(-np.pi, np.pi, (1, self.length, self.head_dim // 2))
        tables = tuple(np.round(f(angles) / _TABLE_STEP) * _TABLE_STEP for f in (np.cos, np.sin)) if self.rope else None
        tables = None if tables is None else tuple(table.astype(np.float32) for table in tables)
        shape = (_LAYERS, self.batch, self.kv_heads, self.capacity, self.head_dim)
        keys, values = (np.full(shape, fill, self.dtype) for fill in (np.nan, 7))

        w_hat, w_size = numbers_of(w)
        product = x.astype(np.float64) @ w_hat + (0 if bias is None else bias)
        # Of the product, of the two terms of a rotation, and of its sum.
        error = 14 * EPS * float((size @ w_size + (0 if bias is None else np.abs(bias))).max())
        expected = self._expected(product.reshape(self.batch, self.length, -1, self.head_dim), tables, keys, values)

        def check(found):
            for got, wanted in zip(found, expected, strict=True):
                if got.dtype != self.dtype:
                    raise AssertionError(f"dtype {got.dtype}, expected {np.dtype(self.dtype)}")
                unwritten = np.isnan(wanted)
                np.testing.assert_array_equal(np.isnan(np.asarray(got, np.float32)), unwritten)
                got, wanted = np.where(unwritten, 0, np.asarray(got, np.float64)), np.where(unwritten, 0, wanted)
                assert_within(got, wanted, error + rounding(self.dtype, wanted))

        def project(x, w, bias, keys, values, layer, tables):
            fixed = None if tables is None else fixed_point_tables(tables, _TILE_ROWS)
            return SM90.prompt_heads(x, w, a_format, bias, None, keys, values, layer, fixed)

        x = x.reshape(self.batch, self.length, self.k)
        return one_program(project, (x, w, bias, keys, values, np.int32(_LAYER), tables), check)

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
    ]
    return [Case(each.name, each.trial) for each in prompts]


def small() -> dict[str, Case]:
    prompts = Prompts(2, 2, 2, 67, 2, 1, 64, 131, bias=True, k=70)
    return {"heads": Case("heads", prompts.trial)}

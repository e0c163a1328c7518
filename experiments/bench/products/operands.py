"""Random operands of one shape, shared by all precisions, and exact products of sampled rows and columns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words, vector_length, weight_words
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens, quantize_and_pack
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.words import WORD_BITS, num_words, unpack_codes
from bipolar_jax.quantize.groups import group_lengths, num_groups, split_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.products.shapes import Shape

_MAX_BITS = 8
_unpack = jax.jit(unpack_codes, static_argnums=(1, 2))
_code_words = jax.jit(code_words, static_argnums=(1, 2))
_weight_words = jax.jit(weight_words, static_argnums=1)
_quantize_tokens = jax.jit(quantize_tokens, static_argnums=1)

_CHECKED = 64  # sampled rows and columns of a product that are compared with the exact one
# Relative rounding error: bf16's half step plus a few float32 roundings.
_ROUNDING = 2.0**-8 + 2.0**-20


class Operands:
    """Codes with uniformly random bits, and normal bf16 activations and weights, made on the device when first used.

    An n-bit operand is the first n of eight random planes. Checks compare a random sample of rows and
    columns of a product with the exact one, which is computed on the host.

    Attributes:
      shape: sizes.
      rows: sampled rows of x.
      columns: sampled columns of w.
    """

    def __init__(self, shape: Shape, seed: int, key: Array | None = None):
        """Chooses the sample; `seed` decides it and, unless they have a `key` of their own, the operands."""
        self.shape = shape
        self._keys = jax.random.split(jax.random.key(seed) if key is None else key, 6)
        rng = np.random.default_rng(seed)
        self.rows = np.sort(rng.choice(shape.m, min(_CHECKED, shape.m), replace=False))
        self.columns = np.sort(rng.choice(shape.n, min(_CHECKED, shape.n), replace=False))
        self._made: dict[tuple, Any] = {}

    @functools.cached_property
    def x(self) -> Float[Array, "m k"]:
        """bf16 activations."""
        return jax.random.normal(self._keys[0], (self.shape.m, self.shape.k), jnp.bfloat16)

    @functools.cached_property
    def dense_w(self) -> Float[Array, "k n"]:
        """bf16 weights."""
        return jax.random.normal(self._keys[1], (self.shape.k, self.shape.n), jnp.bfloat16)

    @functools.cached_property
    def int8(self) -> tuple[Int[Array, "m k"], Int[Array, "n k"]]:
        """Operands of the int8 product, both with k last."""
        sizes = ((self.shape.m, self.shape.k), (self.shape.n, self.shape.k))
        bits = (jax.random.bits(key, size, jnp.uint8) for key, size in zip(self._keys[2:4], sizes, strict=True))
        return tuple(jax.lax.bitcast_convert_type(b, jnp.int8) for b in bits)

    @functools.cached_property
    def _planes(self) -> tuple[UInt32[Array, "8 m words"], UInt32[Array, "8 n words"]]:
        keys, rows = self._keys[4:6], (self.shape.m, self.shape.n)
        return tuple(_random_planes(key, count, self.shape.k) for key, count in zip(keys, rows, strict=True))

    def _once(self, *key: Any, make: Callable[[], Any]) -> Any:
        """The cached value of `key`, made by `make` when first requested."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def codes(self, a_format: BipolarFormat) -> UInt8[Array, "m k"]:
        """Activation codes."""
        return self._once("codes", a_format, make=lambda: _unpack(self.planes_of_x(a_format), a_format, self.shape.k))

    def planes_of_x(self, a_format: BipolarFormat) -> UInt32[Array, "bits m words"]:
        """Bit planes of the activation codes."""
        return _first_planes(self._planes[0], a_format)

    def weights(
        self, w_format: BipolarFormat, group_size: int | None = None, integer_groups: bool = False
    ) -> BipolarArray:
        """Packed weights [k, n] with one scale per column, or per `group_size` weights of a column, or integer ones."""
        key = ("weights", w_format, group_size, integer_groups)
        return self._once(*key, make=lambda: self._pack_weights(w_format, group_size, integer_groups))

    def _pack_weights(self, w_format: BipolarFormat, group_size: int | None, integer_groups: bool) -> BipolarArray:
        planes = _first_planes(self._planes[1], w_format)
        k, n = self.shape.k, self.shape.n
        groups, row_sums = None, _group_sums(planes, w_format, k, group_size)
        if integer_groups:
            groups = _integer_groups(self._keys[5], w_format, (n, num_groups(k, group_size)))
            row_sums = groups.value_sums(row_sums, k, group_size)
        return BipolarArray(
            planes=planes,
            scale=_scales(self._keys[5], row_sums.shape),
            offset=None,
            row_sums=row_sums,
            format=w_format,
            contracted_size=k,
            axis=-2,
            group_size=group_size,
            groups=groups,
        )

    def prepared(self, w: BipolarArray) -> PreparedArray:
        """The weights as `prepare` lays them out."""
        return self._once("prepared", w.format, w.group_size, make=w.prepare)

    def packed_tokens(self, a_format: BipolarFormat, kind: OperandKind) -> PackedTokens:
        """`x`, quantized and packed by the Hopper kernel."""
        return self._once("tokens of x", a_format, kind, make=lambda: self._quantize(a_format, kind))

    def _quantize(self, a_format: BipolarFormat, kind: OperandKind) -> PackedTokens:
        return jax.jit(quantizer(a_format, kind))(self.x)

    def x_words(self, a_format: BipolarFormat, kind: OperandKind) -> UInt32[Array, "planes m words"]:
        """The activation codes in the kernel's layout."""
        return self._once("x", a_format, kind, make=lambda: _code_words(self.codes(a_format), a_format, kind))

    def w_words(self, w_format: BipolarFormat, kind: OperandKind) -> UInt32[Array, "planes n words"]:
        """The weights in the kernel's layout."""
        return self._once("w", w_format, kind, make=lambda: _weight_words(self.weights(w_format), kind))

    def tokens(self, a_format: BipolarFormat) -> TokenTerms:
        """Sums of the activation codes, random zero codes and scales, padded to the length that the quantizer gives."""
        return self._once("tokens", a_format, make=lambda: self._token_terms(a_format))

    def _token_terms(self, a_format: BipolarFormat) -> TokenTerms:
        m, key = self.shape.m, self._keys[4]
        zero_code = jax.random.randint(key, (m,), 0, a_format.max_value + 1, jnp.int32)
        if a_format.bits == 1:  # the 1-bit grid has no zero code
            zero_code = jnp.zeros_like(zero_code)
        sums = _code_sums(self.planes_of_x(a_format), a_format)
        padding = vector_length(m) - m
        return jax.tree.map(lambda term: jnp.pad(term, (0, padding)), TokenTerms(sums, zero_code, _scales(key, (m,))))

    def column_terms(self, w_format: BipolarFormat) -> ColumnTerms:
        """Code sums and scales of the weights."""
        w = self.weights(w_format)
        return ColumnTerms(code_sums=w.row_sums[:, 0], scale=w.scale[:, 0])

    # The exact sample, computed on the host.

    def sampled(self, product: Array) -> np.ndarray:
        """The sampled rows and columns of a product [m, n]."""
        return np.asarray(product[self.rows][:, self.columns])

    def sampled_bits(self, a_format: BipolarFormat, w_format: BipolarFormat) -> list[Float[np.ndarray, "bits rows k"]]:
        """Bits of the sampled rows of x and columns of w, unpacked independently of the library."""
        planes = self.planes_of_x(a_format)[:, self.rows], self.weights(w_format).planes[:, self.columns]
        as_bytes = (np.ascontiguousarray(words).view(np.uint8) for words in planes)
        return [
            np.unpackbits(data, axis=-1, count=self.shape.k, bitorder="little").astype(np.float64) for data in as_bytes
        ]

    def _sampled_codes(self, a_format: BipolarFormat, w_format: BipolarFormat) -> list[Float[np.ndarray, "rows k"]]:
        bits = self.sampled_bits(a_format, w_format)
        return [
            np.tensordot(np.array(fmt.plane_weights, np.float64), planes, axes=1)
            for fmt, planes in zip((a_format, w_format), bits, strict=True)
        ]

    def exact_integers(
        self, a_format: BipolarFormat, w_format: BipolarFormat, integer_group_size: int | None = None
    ) -> Int[np.ndarray, "rows columns"]:
        """sum_k v_a v_w of the sample; exact in float64, because sums are below 2^53."""
        x, _ = self._sampled_codes(a_format, w_format)
        w = self._sampled_values(a_format, w_format, integer_group_size, integer_group_size is not None)
        return ((2 * x - a_format.max_value) @ w.T).astype(np.int64)

    def _sampled_values(
        self, a_format: BipolarFormat, w_format: BipolarFormat, group_size: int | None, integer_groups: bool
    ) -> Float[np.ndarray, "columns k"]:
        """Values of the sampled columns of w."""
        _, codes = self._sampled_codes(a_format, w_format)
        if not integer_groups:
            return 2 * codes - w_format.max_value
        groups = self.weights(w_format, group_size, integer_groups=True).groups
        lengths = group_lengths(self.shape.k, group_size)
        scale, offset = (
            np.repeat(np.asarray(term)[self.columns].astype(np.float64), lengths, axis=1)
            for term in (groups.scale, groups.offset)
        )
        return scale * codes + offset

    def exact_output(self, a_format: BipolarFormat, w_format: BipolarFormat) -> Float[np.ndarray, "rows columns"]:
        """The kernel's exact sample in float64: s_x s_w sum_k (v_a - v0) v_w, with v0 = 0 for 1-bit activations."""
        return self._once("output", a_format, w_format, make=lambda: self._exact_output(a_format, w_format))

    def _exact_output(self, a_format: BipolarFormat, w_format: BipolarFormat) -> Float[np.ndarray, "rows columns"]:
        x, w = self._sampled_codes(a_format, w_format)
        tokens, columns = self.tokens(a_format), self.column_terms(w_format)
        zero_code = a_format.max_value / 2 if a_format.bits == 1 else np.asarray(tokens.zero_code)[self.rows, None]
        integers = 2 * (x - zero_code) @ (2 * w - w_format.max_value).T
        scale = np.asarray(tokens.scale, np.float64)[self.rows, None]
        return integers * scale * np.asarray(columns.scale, np.float64)[self.columns]

    def exact_operation(
        self,
        a_format: BipolarFormat,
        w_format: BipolarFormat,
        group_size: int | None = None,
        integer_groups: bool = False,
    ) -> tuple[Float[np.ndarray, "rows columns"], Float[np.ndarray, "rows columns"]]:
        """The operation's exact sample in float64, and its tolerance for activations halfway between two codes."""
        tokens = _quantize_tokens(self.x[self.rows], a_format)
        steps = a_format.values(tokens.codes) - tokens.zero_value[:, None]
        x = np.asarray(steps, np.float64) * np.asarray(tokens.scale, np.float64)[:, None]
        weights = self.weights(w_format, group_size, integer_groups)
        w_scale = np.asarray(weights.scale, np.float64)[self.columns]
        w_scale = np.repeat(w_scale, group_lengths(self.shape.k, weights.scale_group_size), axis=1)
        w = self._sampled_values(a_format, w_format, group_size, integer_groups) * w_scale
        # An activation halfway between two codes may get either; they differ by 2 * scale. Allows two per row.
        tolerance = 4 * np.asarray(tokens.scale, np.float64)[:, None] * np.abs(w).max(axis=1)
        return x @ w.T, tolerance


def quantizer(a_format: BipolarFormat, kind: OperandKind) -> Callable[[Array], PackedTokens]:
    """The Hopper kernel that quantizes and packs activations, as a function of x."""
    interpret = interpret_params()
    return lambda x: quantize_and_pack(x, a_format, kind, interpret=interpret)


def check_integers(got: np.ndarray, expected: np.ndarray) -> None:
    """Raises ValueError if any integer differs."""
    wrong = int(np.count_nonzero(got != expected))
    if wrong:
        first = tuple(np.argwhere(got != expected)[0])
        raise ValueError(
            f"wrong integers: {wrong} of {expected.size} compared differ, the first is {got[first]}, "
            f"not {expected[first]}"
        )


def check_output(product: Array, got: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float = 0.0) -> float:
    """Checks a bf16 product.

    Args:
      product: the whole product.
      got: its sample.
      expected: the exact sample.
      tolerance: allowed error beside rounding.

    Returns:
      The largest error, relative to the largest number of the exact sample.

    Raises:
      ValueError: a number is not finite, or its error exceeds rounding plus `tolerance`.
    """
    if not bool(jnp.all(jnp.isfinite(product))):
        raise ValueError("wrong output: not all numbers are finite")
    error = np.abs(got.astype(np.float64) - expected)
    worst = float(np.max(error - tolerance - _ROUNDING * np.abs(expected)))
    if worst > 0:
        raise ValueError(
            f"wrong output: an error exceeds rounding by {worst:.3g} (exact numbers up to {np.abs(expected).max():.3g})"
        )
    return float(error.max() / np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_planes(key, rows: int, k: int) -> UInt32[Array, "8 rows words"]:
    words = jax.random.bits(key, (_MAX_BITS, rows, num_words(k)), jnp.uint32)
    if k % WORD_BITS:
        words = words.at[..., -1].set(words[..., -1] & np.uint32((1 << k % WORD_BITS) - 1))
    return words


def _first_planes(planes: UInt32[Array, "8 rows words"], number_format: BipolarFormat) -> UInt32[Array, "..."]:
    if number_format.ternary:  # codes 0, 1, 2 have (low, high) plane bits 00, 10, 11
        return jnp.stack([planes[0] | planes[1], planes[0] & planes[1]])
    return planes[: number_format.bits]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _group_sums(
    planes: UInt32[Array, "bits rows words"], number_format: BipolarFormat, k: int, group_size: int | None
) -> Int[Array, "rows groups"]:
    codes = unpack_codes(planes, number_format, k)
    return jnp.sum(split_groups(codes, group_size), axis=-1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _code_sums(planes: UInt32[Array, "bits rows words"], number_format: BipolarFormat) -> Int[Array, " rows"]:
    counts = jnp.sum(jax.lax.population_count(planes), axis=-1, dtype=jnp.int32)
    return sum(np.int32(weight) * count for weight, count in zip(number_format.plane_weights, counts, strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _integer_groups(key, number_format: BipolarFormat, size: tuple[int, int]) -> IntegerGroups:
    """Any s and o with which s * u + o is a signed byte."""
    s_key, o_key = jax.random.split(key)
    scale = jax.random.randint(s_key, size, 1, 255 // number_format.max_value + 1, jnp.int32)
    offset = jax.random.randint(o_key, size, -128, 128 - number_format.max_value * scale, jnp.int32)
    return IntegerGroups(scale.astype(jnp.uint8), offset.astype(jnp.int8))


def _scales(key, size: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(key, size, jnp.float32, 0.5, 2.0) * np.float32(2**-10)


def int8_product(x: Int[Array, "m k"], w: Int[Array, "n k"]) -> Int[Array, "m n"]:
    """XLA's int8 product with int32 output; k is last in both operands."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

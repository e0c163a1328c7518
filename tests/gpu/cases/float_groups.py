"""Products of prepared weights whose groups have float scales, in every form of terms, against float64."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.ops.dispatch import BACKENDS
from bipolar_jax.packing.float_terms import BLOCK_TERMS, FloatTerms
from tests.gpu.cases.operands import ALWAYS_FEW, EPS, assert_within, exact_tokens, generator, numbers_of
from tests.gpu.cases.scaled_products import gated_numbers
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.float_groups import float_groups

SM90 = BACKENDS["sm90"]
_KINDS = ("scales", "zeros", "minimums", "offsets")
_FEW, _MANY = (1, 3, 8, 16, 17, 33, 64), (65, 130, 300)
# n, k: ragged, one stage and many, more units than blocks.
_SIZES = [(132, 97), (4096, 1500), (260, 14336), (9002, 640), (1024, 4096)]
_GROUP_SIZES = (16, 32, 48, 64, 96, 128, 256)
_LONG = 64  # groups of a multiple of it are scaled as sums of products of bytes
_K_TYPES = (
    ("block_nibbles", 2, 16),
    ("block_scales", 3, 16),
    ("block_minimums", 4, 32),
    ("block_minimums", 5, 32),
    ("block_scales", 6, 16),
)
_FLOAT16 = 2.0**-11  # of a weight: half a unit in the last place, of a number that is at least half of the largest


@dataclasses.dataclass(frozen=True)
class Product:
    """One product; `gated` has SiLU's gates and their values."""

    kind: FloatTerms
    bits: int
    group_size: int
    a_bits: int
    m: int
    n: int
    k: int
    gated: bool = False

    @property
    def name(self) -> str:
        sizes = f"{self.m}x{self.n}x{self.k}"
        return f"W{self.bits}A{self.a_bits}g{self.group_size}f {self.kind} {sizes}{' gated' * self.gated}"

    def trial(self) -> Trial:
        rng, a_format = generator(self.m, self.n, self.k, self.bits), BipolarFormat(self.a_bits)
        x, x_size = exact_tokens(rng, self.m, self.k, a_format, np.float32)
        w = float_groups(BipolarFormat(self.bits), self.n, self.k, self.group_size, self.kind, seed=self.bits)
        if self.kind not in BLOCK_TERMS:
            w = dataclasses.replace(w, scale=w.scale / 16, offset=None if w.offset is None else w.offset / 16)
        w_hat, w_size = numbers_of(w.with_scales())
        # A code times S and Z times S are up to twice a value each.
        w_size = 2 * np.max(w_size, axis=0, keepdims=True) * np.ones_like(w_size)
        bias = rng.normal(size=self.n).astype(np.float32)
        expected = x.astype(np.float64) @ w_hat + bias
        tolerance = (self.k / 16 + 10) * EPS * (x_size @ w_size + np.abs(bias))
        if self.m > FEW_TOKENS_LIMIT and self.group_size % _LONG:
            tolerance = tolerance + _FLOAT16 * (np.abs(x.astype(np.float64)) @ w_size)
        if self.gated:
            expected, tolerance = gated_numbers("silu", expected, tolerance)

        def product(x, w, bias):
            activation = Activation("silu", gated=True) if self.gated else None
            prepared = w.prepare(gated=self.gated, float_terms=self.kind)
            return SM90.quantized_matmul(x, prepared, a_format, bias, None, None, activation)

        kernel = "few_tokens_matmul" if self.m <= ALWAYS_FEW else None  # groups that hold all of K are none: tiles
        return one_program(product, (x, w, bias), lambda y: assert_within(y, expected, tolerance), kernel=kernel)


def cases() -> list[Case]:
    """Every width in every form, with group sizes, tokens, sizes and activations in turn."""
    products = [
        Product(
            kind,
            bits,
            _GROUP_SIZES[(index + turn) % len(_GROUP_SIZES)],
            8 - (index + turn) % 8,
            tokens[index % len(tokens)],
            *_SIZES[(index + turn) % len(_SIZES)],
            gated=index % 3 == 1,
        )
        for turn, tokens in enumerate((_FEW, _FEW[::-1], _MANY))
        for index, (kind, bits) in enumerate(itertools.product(_KINDS, range(1, 9)))
    ]
    products += [Product("zeros", 4, 128, 8, m, 4096, 2048) for m in _FEW]
    products += [Product("zeros", 4, group_size, 8, 64, 4096, 14336) for group_size in (32, 128)]
    # Sums that are scaled in registers: more tiles than blocks, every width, and one that ends within a stage.
    products += [Product(kind, 4, 128, 8, 1025, 4099, 4096) for kind in _KINDS]
    products += [
        Product("offsets", 4, 128, 8, 1500, 8192, 4096, gated=True),
        Product("zeros", 4, 64, 8, 777, 4096, 1500),
    ]
    products += [Product(_KINDS[bits % 3], bits, 128 * (1 + bits % 2), 8, 200, 1000, 1500) for bits in range(1, 9)]
    # Weights that become float16 in registers: as many tiles, heads' widths, K in parts, and every width.
    products += [Product(kind, 4, 32, 8, 1025, 4099, 4096) for kind in _KINDS]
    products += [
        Product("offsets", 4, 32, 8, 1500, 8192, 4096, gated=True),
        Product("zeros", 4, 16, 8, 200, 512, 14336),
    ]
    products += [Product(_KINDS[bits % 4], bits, 16 * (1 + bits % 3), 8, 200, 1000, 1500) for bits in range(1, 9)]
    # K types of GGUF: gated, of few tokens in one and several units, and many.
    products += [
        Product(kind, bits, group_size, 8, m, n, 2048, gated=gated)
        for kind, bits, group_size in _K_TYPES
        for m, n, gated in ((1, 4096, False), (16, 9000, True), (64, 1024, False), (200, 1000, False))
    ]
    return [Case(product.name, product.trial) for product in products]


def small() -> dict[str, Case]:
    few, many = Product("offsets", 4, 64, 8, 3, 300, 700), Product("zeros", 3, 32, 8, 70, 68, 300, gated=True)
    scaled, blocks = Product("offsets", 4, 128, 8, 140, 600, 700), Product("block_minimums", 4, 32, 8, 3, 300, 768)
    products = {"few": few, "many": many, "in registers, many": scaled, "few, K types,": blocks}
    return {f"{name} tokens, float groups": Case(name, product.trial) for name, product in products.items()}

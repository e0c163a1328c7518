"""Quantized products with scales, groups, offsets, bias, residual and activation, against float64.

Also of weights that are expanded in registers: with integer groups, or laid out beforehand.
"""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import (
    ALWAYS_FEW,
    EPS,
    assert_within,
    exact_tokens,
    generator,
    numbers_of,
    random_weights,
    rounding,
)
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.integer_groups import array_of_groups, random_groups
from tests.sampling import sample
from tests.support.integer_products import W_FORMATS

SM90 = BACKENDS["sm90"]

_TOKENS = (1, 3, 16, 32, 64, 70, 130, 300)
_GROUP_SIZES = (None, 32, 64, 128, None, 256, 512, 1024)
_DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
_EPILOGUES = (None, "bias", "residual", "silu", "gelu")
_A_BITS = (8, 1, 4, 2, 8, 3, 5)
_CASES = 44  # of a group
_DRAWN = 500  # that they are chosen from
# Of exp and tanh by approximate instructions, and of the sigmoid made of them.
_FUNCTION_ERROR = 2.0**-16


@dataclasses.dataclass(frozen=True)
class Product:
    """One product.

    Attributes:
      epilogue: None, "bias", "residual" (with a bias) or the name of a gated activation.
      layout: None for planes with float scales; "packed" for planes with integer groups; "prepared" or "gated" for
        a `PreparedArray`, whose groups are integer.
    """

    w_format: BipolarFormat
    a_bits: int
    m: int
    n: int
    k: int
    dtype: type
    group_size: int | None = None
    offsets: bool = False
    epilogue: str | None = None
    layout: str | None = None

    @property
    def name(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        options = ["offsets"] * self.offsets + [each for each in (self.epilogue, self.layout) if each is not None]
        sizes = f"{self.m}x{self.n}x{self.k}"
        return " ".join([f"W{self.w_format.name}A{self.a_bits}{group}", sizes, np.dtype(self.dtype).name, *options])

    def trial(self) -> Trial:
        rng, a_format = generator(self.m, self.n, self.k, self.a_bits), BipolarFormat(self.a_bits)
        gated = self.epilogue in ("silu", "gelu")
        activation = Activation(self.epilogue, gated=True) if gated else None
        columns = 2 * self.n if gated else self.n
        x, x_size = exact_tokens(rng, self.m, self.k, a_format, self.dtype)
        w, (w_hat, w_size) = self._weights(rng, columns)
        bias = rng.normal(size=columns).astype(self.dtype) if self.epilogue else None
        residual = (10 * rng.normal(size=(self.m, self.n))).astype(self.dtype) if self.epilogue == "residual" else None
        term = 0.0 if bias is None else bias.astype(np.float64)
        expected = x.astype(np.float64) @ w_hat + term
        # Integers are exact. Each float scale rounds some terms; the token's zero is corrected for at the end.
        tolerance = (w.scale.shape[-1] + 10) * EPS * (x_size @ w_size + np.abs(term))
        if gated:
            expected, tolerance = gated_numbers(self.epilogue, expected, tolerance)
        tolerance = tolerance + rounding(self.dtype, expected)
        if residual is not None:
            expected = expected + residual.astype(np.float64)
            tolerance = tolerance + EPS * np.abs(expected) + rounding(self.dtype, expected)

        def check(y):
            if y.dtype != self.dtype:
                raise AssertionError(f"dtype {y.dtype}, expected {np.dtype(self.dtype)}")
            assert_within(y, expected, tolerance)

        def product(x, w, bias, residual):
            w = w if self.layout in (None, "packed") else w.prepare(gated=self.layout == "gated")
            return SM90.quantized_matmul(x, w, a_format, bias, None, residual, activation)

        kernel = None  # from 17 to 64 tokens the planner chooses between these two
        if self.layout is not None and not ALWAYS_FEW < self.m <= FEW_TOKENS_LIMIT:
            kernel = "few_tokens_matmul" if self.m <= ALWAYS_FEW else "expanded_matmul"
        return one_program(product, (x, w, bias, residual), check, kernel=kernel)

    def _weights(self, rng: np.random.Generator, n: int) -> tuple[BipolarArray, tuple[np.ndarray, np.ndarray]]:
        """Weights, and their numbers and sizes as `numbers_of` gives them."""
        if self.layout is None or self.group_size is None:
            w = random_weights(rng, n, self.k, self.w_format, self.group_size, self.offsets)
            return w, numbers_of(w)
        groups = random_groups(self.w_format, n, self.k, self.group_size, seed=int(rng.integers(1 << 30)))
        scale = (rng.uniform(0.5, 1.5, n) / (128 * np.sqrt(self.k))).astype(np.float32)
        numbers = groups.values.T * scale.astype(np.float64)
        return array_of_groups(groups, self.w_format, scale), (numbers, np.abs(numbers))


def gated_numbers(function: str, y: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """function(gate) * up in float64, and the error that errors of gate and up leave: |derivative| is below 1.2."""
    (gate, up), (gate_error, up_error) = np.split(y, 2, axis=1), np.split(error, 2, axis=1)
    if function == "silu":
        activated = gate / (1 + np.exp(-np.clip(gate, -700, 700)))
    else:
        activated = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
    error = 1.2 * gate_error * (np.abs(up) + up_error) + np.abs(activated) * up_error
    return activated * up, error + _FUNCTION_ERROR * np.abs(gate * up)


def cases(weights: str, tokens: str) -> list[Case]:
    """Products whose options are drawn, then chosen so that as many pairs of options as possible meet.

    The same in every run.

    Args:
      weights: "planes" for planes with float scales; "expanded" for weights that kernels expand in registers.
      tokens: "few" or "many": each has kernels of its own.
    """
    few = tokens == "few"
    rng = generator(["planes", "expanded"].index(weights), few)
    sizes = [m for m in _TOKENS if (m <= FEW_TOKENS_LIMIT) == few]
    draw = _planes if weights == "planes" else _expanded
    drawn = [draw(rng, index, int(sizes[rng.integers(len(sizes))])) for index in range(_DRAWN)]
    chosen = [drawn[index] for index in sorted(sample([_pairs(product) for product in drawn], _CASES))]
    return [Case(f"{index}: {product.name}", product.trial) for index, product in enumerate(chosen)]


def _planes(rng: np.random.Generator, index: int, m: int) -> Product:
    group_size = _GROUP_SIZES[rng.integers(len(_GROUP_SIZES))]
    k = int(rng.integers(2, 2500))
    return Product(
        W_FORMATS[index % len(W_FORMATS)],
        _A_BITS[index % len(_A_BITS)],
        m=m,
        n=int(rng.integers(1, 400)),
        k=max(k, (group_size or 0) + 1),
        dtype=_DTYPES[rng.integers(len(_DTYPES))],
        group_size=group_size,
        offsets=bool(rng.integers(2)),
        epilogue=_EPILOGUES[rng.integers(len(_EPILOGUES))],
    )


def _expanded(rng: np.random.Generator, index: int, m: int) -> Product:
    """Every layout, at all widths that it has."""
    layout = ("packed", "prepared", "gated")[index % 3]
    group_size = (16, 32, 64, 128, 192, None)[rng.integers(5 if layout == "packed" else 6)]
    return Product(
        BipolarFormat(1 + index // 3 % (8 if group_size is None else 6)),
        _A_BITS[index % len(_A_BITS)],
        m=m,
        n=2 * int(rng.integers(1, 300)),
        k=int(rng.integers(2, 2500)),
        dtype=_DTYPES[rng.integers(len(_DTYPES))],
        group_size=group_size,
        offsets=group_size is None and bool(rng.integers(2)),
        epilogue=_EPILOGUES[rng.integers(len(_EPILOGUES))],
        layout=layout,
    )


def _pairs(product: Product) -> dict[str, int]:
    """A number of each pair of options; of sizes, the tokens alone are an option."""
    options = {name: value for name, value in vars(product).items() if name not in ("n", "k")}
    pairs = itertools.combinations(options.items(), 2)
    return {f"{name}, {other}": hash((value, second)) for (name, value), (other, second) in pairs}


def small() -> dict[str, Case]:
    products = {
        "gemm, groups": Product(BipolarFormat(4), 8, 70, 67, 300, np.float32, 64, offsets=True, epilogue="bias"),
        "few tokens, groups": Product(BipolarFormat(3), 4, 2, 67, 1100, np.float32, 128, offsets=True),
        "gemm, activation": Product(BipolarFormat(2), 2, 70, 64, 300, np.float32, epilogue="silu"),
    }
    return {name: Case(name, product.trial) for name, product in products.items()}

"""Integer products: every pair of precisions, bit for bit the int32 product of decoded values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import packed_weights
from tests.gpu.trial import Case, Trial, one_program
from tests.support.integer_products import A_FORMATS, W_FORMATS, codes_with_extremes, expected_product

SM90 = BACKENDS["sm90"]

# m, n, k: none of them a multiple of 8 where that is possible. More than 64 tokens go to the gemm.
SIZES = {
    "gemm": [(70, 131, 97), (131, 67, 1500), (300, 259, 333), (97, 515, 1030), (65, 33, 2049)],
    # At most 256 columns of planes: 32 tokens of 8 bits.
    "few tokens": [(1, 257, 1500), (5, 131, 97), (17, 70, 2500), (32, 203, 700), (3, 1031, 4100)],
}
ROOMS = {"gemm": "sm90.gemm.", "few tokens": "sm90.gemm_few_tokens."}
_SIZES_A_PAIR = 2


def cases(kernel: str, weights: str) -> list[Case]:
    """Every pair of half of the weight formats, at two of the kernel's sizes each, and the largest sums."""
    formats = W_FORMATS[:4] if weights == "W1 to W4" else W_FORMATS[4:]
    sizes = SIZES[kernel]
    pairs = [(w_format, a_format) for w_format in formats for a_format in A_FORMATS]
    chosen = [
        _case(kernel, w_format, a_format, *sizes[(index + 2 * turn) % len(sizes)])
        for index, (w_format, a_format) in enumerate(pairs)
        for turn in range(_SIZES_A_PAIR)
    ]
    if kernel == "few tokens" and weights == "W1 to W4":
        # Tokens in parts, or the gemm, as the plan chooses.
        chosen += [
            _case(None, BipolarFormat(w_bits), BipolarFormat(8), m, 130, k)
            for w_bits, m, k in ((1, 64, 96), (2, 33, 1100), (4, 48, 200), (3, 41, 1500))
        ]
    if kernel == "gemm" and weights == "W1 to W4":  # tiles so few that the plan splits K
        long = ((2, 2, 56_000), (4, 8, 12_100))  # a row of more float32 numbers is too long for the quantizer
        chosen += [_case(kernel, BipolarFormat(w), BipolarFormat(a), 70, 67, k) for w, a, k in long]
    if weights != "W1 to W4":
        chosen += [_largest_sum(kernel, sign) for sign in (1, -1)]
    return chosen


def small() -> dict[str, Case]:
    return {
        "gemm, planes": _case("gemm", BipolarFormat(2), BipolarFormat(2), 70, 67, 300),
        "gemm, bytes": _case("gemm", BipolarFormat(4), BipolarFormat(8), 70, 67, 300),
        "few tokens": _case("few tokens", BipolarFormat(3), BipolarFormat(4), 3, 67, 1100),
    }


def _case(kernel: str | None, w_format: BipolarFormat, a_format: BipolarFormat, m: int, n: int, k: int) -> Case:
    def make() -> Trial:
        x = codes_with_extremes(a_format, m, k, seed=m + k)
        w = codes_with_extremes(w_format, n, k, seed=n + k)
        return _trial(kernel, x, a_format, w, w_format)

    return Case(f"W{w_format.name}A{a_format.name} {m}x{n}x{k}", make)


def _largest_sum(kernel: str, sign: int) -> Case:
    """K = max_contraction at 8 x 8 bits, all values +-255: 33025 * 255^2 = 2147450625."""
    fmt = BipolarFormat(8)
    m, k = {"gemm": 70, "few tokens": 1}[kernel], fmt.max_contraction(fmt)

    def make() -> Trial:
        x, w = np.full((m, k), 255 if sign == 1 else 0, np.uint8), np.full((5, k), 255, np.uint8)
        return _trial(kernel, x, fmt, w, fmt)

    return Case(f"W8A8 {m}x5x{k}, the {'largest' if sign == 1 else 'least'} sum", make)


def _trial(kernel: str | None, x, a_format: BipolarFormat, w, w_format: BipolarFormat) -> Trial:
    packed = packed_weights(w, w_format, None, np.ones((len(w), 1)), None)
    expected = expected_product(x, a_format, w, w_format, None)

    def check(product):
        if product.dtype != np.int32:
            raise AssertionError(f"dtype {product.dtype}, expected int32")
        np.testing.assert_array_equal(product, expected)

    def product(codes, w):
        if kernel is not None:
            room = type(SM90.plan_matmul(len(codes), jnp.float32, w, a_format).tiling).__module__ + "."
            if ROOMS[kernel] not in room:
                raise AssertionError(f"the plan takes {room}, not {kernel}: choose other sizes")
        return SM90.integer_matmul(codes, w, a_format)

    return one_program(product, (x, packed), check)

"""Feed-forward blocks whose first product leaves one-bit tokens: the numbers of two products by themselves."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.backend import Layer
from bipolar_jax.kernels.semantics.prologue import Activation, RMSNorm
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import generator, random_weights
from tests.gpu.trial import Case, Program, Trial, repeated
from tests.support.integer_products import W_FORMATS

SM90 = BACKENDS["sm90"]

_ONE_BIT = BipolarFormat(1)


def cases() -> list[Case]:
    half, wide = np.float16, ml_dtypes.bfloat16
    return [
        _case(*sizes)
        for sizes in [
            # tokens, hidden, ffn, weight format, bits of the first product's tokens, dtype, function, gated
            (70, 64, 96, W_FORMATS[0], 1, wide, "silu", True),
            (300, 256, 1000, W_FORMATS[0], 1, wide, "silu", True),
            (131, 200, 515, W_FORMATS[1], 2, half, "silu", True),
            (257, 128, 384, W_FORMATS[3], 8, wide, "silu", True),
            (90, 100, 333, W_FORMATS[8], 4, half, "gelu", False),
            (1000, 512, 2048, W_FORMATS[0], 1, half, "gelu", True),
            (65, 96, 130, W_FORMATS[7], 8, wide, None, False),
        ]
    ]


def small() -> dict[str, Case]:
    return {"signs": _case(70, 64, 96, W_FORMATS[0], 1, ml_dtypes.bfloat16, "silu", True)}


def _case(m: int, hidden: int, ffn: int, w_format, a_bits: int, dtype, function: str | None, gated: bool) -> Case:
    activation = None if function is None else Activation(function, gated=gated)
    parts = 1 if activation is None else activation.parts

    def make() -> Trial:
        rng = generator(m, hidden, ffn)
        x, residual = (rng.normal(size=(m, hidden)).astype(dtype) for _ in range(2))
        norm = RMSNorm((1 + rng.normal(size=hidden) / 4).astype(np.float32), 1e-5)
        up = random_weights(rng, parts * ffn, hidden, w_format, None, True)
        down = random_weights(rng, hidden, ffn, w_format, None, False)
        bias = rng.normal(size=parts * ffn).astype(np.float32)
        operands = (x, up, down, bias, norm, residual)
        make_program = functools.partial(Program, operands=operands)
        programs = {
            "signs": make_program(functools.partial(_by_signs, a_bits=a_bits, activation=activation)),
            "products": make_program(functools.partial(_by_products, a_bits=a_bits, activation=activation)),
        }

        def check(compiled):
            found = repeated(lambda: compiled["signs"](*operands))
            expected = repeated(lambda: compiled["products"](*operands))
            assert np.isfinite(np.asarray(expected, np.float32)).all()
            np.testing.assert_array_equal(found, expected)

        return Trial(programs, check)

    name = f"W{w_format.name}A{a_bits} {m}x{hidden}x{ffn} {np.dtype(dtype).name}"
    return Case(" ".join([name, function or "no function", *["gated"] * gated]), make)


def _by_signs(x, up, down, bias, norm, residual, *, a_bits: int, activation):
    layers = Layer(up, BipolarFormat(a_bits), bias), Layer(down, _ONE_BIT, None)
    return SM90.feed_forward(x, *layers, norm, activation, residual)


def _by_products(x, up, down, bias, norm, residual, *, a_bits: int, activation):
    y = SM90.quantized_matmul(x, up, BipolarFormat(a_bits), bias, norm, None, activation)
    return SM90.quantized_matmul(y, down, _ONE_BIT, None, None, residual)

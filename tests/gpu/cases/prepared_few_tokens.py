"""Products of few tokens with prepared weights: bit for bit the int32 product of decoded values."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, RMSNorm
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import (
    FloatTokensToQuantize,
    few_tokens_integers,
    few_tokens_product,
    float_rows,
)
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import quantizing_tiling, with_slots
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from tests.gpu.cases.operands import generator
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support.integer_products import codes_with_extremes

# n, k: ragged, one stage and many, more units than blocks.
_SIZES = [(131, 97), (4096, 1500), (260, 14336), (9001, 640), (28672, 300)]
_TOKENS = (1, 3, 8, 16, 17, 33, 64)
_GROUP_SIZES = (16, 32, 48, 64, 128, 256)
# m, n, k, prologue of tokens that the kernel quantizes: by one, two and four blocks, with no unit, one, or many.
_QUANTIZED = [
    (1, 4096, 14336, "rms"),
    (3, 131, 256, None),
    (5, 9001, 640, "layer"),
    (8, 6144, 4096, "rms"),
    (11, 260, 1152, "gated"),
    (16, 28672, 4096, "rms"),
    (16, 4096, 4096, None),
    (14, 130_000, 1024, "rotated"),
    (4, 4096, 8192, "rms"),
]
# Beside the one that is chosen, with as many slots as fit.
_TILINGS = [
    FewTokensTiling(1, parts=3, depth=2),
    FewTokensTiling(2, parts=4, cluster=4),
    FewTokensTiling(4, parts=2),
    FewTokensTiling(2, parts=7),
    FewTokensTiling(3, parts=2, cluster=2),
]


def cases() -> list[Case]:
    """Every width and group size, without groups, and activations of every width; tokens, sizes and tilings in turn."""
    weights = [*itertools.product(range(1, 7), _GROUP_SIZES), *((bits, None) for bits in range(1, 9))]
    chosen = [
        _case(
            bits,
            group_size,
            8 - index % 8,
            _TOKENS[index % len(_TOKENS)],
            *_SIZES[index % len(_SIZES)],
            None if index % 2 else _TILINGS[index // 2 % len(_TILINGS)],
            gated=index % 11 == 0,
        )
        for index, (bits, group_size) in enumerate(weights)
    ]
    by_tokens = [_case(4, 128, 8, m, 4096, 2048, None) for m in _TOKENS]
    return [
        *chosen,
        *by_tokens,
        *(_quantizing_case(*sizes) for sizes in _QUANTIZED),
        _case(4, 128, 8, 64, 256, 65_664, None),
        _case(2, 64, 8, 8, 4098, 640, None, gated=True),
    ]


def small() -> dict[str, Case]:
    return {
        "few tokens, prepared groups": _case(4, 64, 8, 3, 300, 700, _TILINGS[0]),
        "few tokens, prepared codes": _case(3, None, 8, 17, 300, 700, _TILINGS[1]),
        "few tokens, quantized": _quantizing_case(10, 300, 640, "rms"),
    }


def _case(bits, group_size, a_bits: int, m: int, n: int, k: int, tiling: FewTokensTiling | None, gated=False) -> Case:
    n += gated and n % 2
    name = f"W{bits}A{a_bits}" + ("" if group_size is None else f"g{group_size}")
    by = "" if tiling is None else f" by {tiling.warpgroups} warpgroups, {tiling.parts} parts, {tiling.cluster} blocks"
    return Case(
        f"{name} {m}x{n}x{k}{' gated' * gated}{by}",
        lambda: _trial(BipolarFormat(bits), group_size, BipolarFormat(a_bits), m, n, k, tiling, gated),
    )


def _quantizing_case(m: int, n: int, k: int, prologue: str | None) -> Case:
    return Case(
        f"W4A8g128 {m}x{n}x{k} quantizes tokens {prologue or ''}".strip(), lambda: _quantizing(m, n, k, prologue)
    )


def _quantizing(m: int, n: int, k: int, name: str | None) -> Trial:
    """A product that quantizes its tokens, bit for bit that of tokens which `quantize_rows` has quantized."""
    rng, a_format, w_format = generator(m + n + k), BipolarFormat(8), BipolarFormat(4)
    vectors = [rng.standard_normal(k).astype(ml_dtypes.bfloat16) for _ in range(2)]
    prologue = {
        None: None,
        "rms": RMSNorm(vectors[0], 1e-5),
        "layer": LayerNorm(*vectors, 1e-5),
        "gated": Activation("silu", gated=True),
        "rotated": hadamard(k, block=64),
    }[name]
    x = rng.standard_normal((m, k * (2 if name == "gated" else 1))).astype(ml_dtypes.bfloat16)
    w = array_of_groups(random_groups(w_format, n, k, 128, seed=n), w_format, rng.random(n, np.float32))

    def products(x, prologue, w):
        w, interpret = w.prepare(), interpret_params()
        tokens = FloatTokensToQuantize(x, prologue)
        tiling = quantizing_tiling(float_rows(tokens, k), n, w.bits, w.chunks)
        options = {"dtype": np.dtype(np.float32), "interpret": interpret}
        together = few_tokens_product(tokens, w, a_format, None, tiling=tiling, **options)
        tokens = quantize_and_pack(x, a_format, "int8", prologue=prologue, interpret=interpret)
        return together, few_tokens_product(tokens, w, a_format, None, **options)

    def check(out):
        np.testing.assert_array_equal(*out)

    return one_program(products, (x, prologue, w), check, kernel="few_tokens_matmul")


def _trial(w_format, group_size, a_format, m: int, n: int, k: int, tiling: FewTokensTiling | None, gated) -> Trial:
    x, ones = codes_with_extremes(a_format, m, k, seed=m + k), np.ones(n, np.float32)
    if group_size is None:
        codes = codes_with_extremes(w_format, n, k, seed=n + k)
        w, values = array_of_codes(codes, w_format, ones), 2.0 * codes - w_format.max_value
    else:
        groups = random_groups(w_format, n, k, group_size, seed=n + k)
        w, values = array_of_groups(groups, w_format, ones), groups.values.astype(np.float64)
    # In float64, which is exact below 2^53.
    expected = ((2.0 * x - a_format.max_value) @ values.T).astype(np.int64)

    def product(codes, w):
        w = w.prepare(gated=gated)
        fitted = None if tiling is None else with_slots(tiling, m, w.bits, w.chunks)
        fitted = fitted if fitted is not None and fitted.slots >= 2 else None
        return few_tokens_integers(codes, w, a_format, tiling=fitted, interpret=interpret_params())

    def check(out):
        np.testing.assert_array_equal(out[..., 0], expected)

    return one_program(product, (x, w), check, kernel="few_tokens_matmul")

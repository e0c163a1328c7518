"""Float activations times prepared weights, integer groups and float ones, against their numbers in float64."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.ops.dispatch import BACKENDS
from bipolar_jax.packing.float_terms import BLOCK_TERMS, FloatTerms
from tests.gpu.cases.operands import assert_within, generator, rounding
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.float_groups import float_groups, numbers_of
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support.integer_products import codes_with_extremes

SM90 = BACKENDS["sm90"]

# n, k: ragged, one stage and many, more units than blocks.
_SIZES = [(131, 97), (4096, 1500), (260, 14336), (9001, 640), (28672, 300)]
_TOKENS = (1, 129, 3, 130, 8, 300, 16, 513, 17, 70, 64)
_GROUP_SIZES = (16, 32, 48, 64, 128, 256)
_DTYPES = (ml_dtypes.bfloat16, np.float16)
_LAYOUTS = ("packed", "prepared", "gated")


def cases() -> list[Case]:
    """Every width and group size, without groups, and ternary; tokens, sizes, dtypes and layouts in turn."""
    formats = [*map(BipolarFormat, range(1, 7)), TERNARY]
    weights = [*itertools.product(formats, _GROUP_SIZES), *((BipolarFormat(bits), None) for bits in range(1, 9))]
    kinds: tuple[FloatTerms, ...] = ("scales", "zeros", "minimums", "offsets", *BLOCK_TERMS)
    float_weights = [
        (BipolarFormat(1 + at % 8), ((16, 32) if kind in BLOCK_TERMS else _GROUP_SIZES)[at % 2], kind)
        for at, kind in enumerate(kinds * 4)
    ]
    # Many tokens: more tiles than blocks, K in parts, tokens that end within a tile.
    many = [
        _case(BipolarFormat(4), group_size, m, n, k, dtype, layout)
        for (group_size, dtype), (m, n, k, layout) in itertools.product(
            ((128, _DTYPES[0]), (32, _DTYPES[1])),
            ((1025, 4099, 4096, "prepared"), (1500, 8192, 1000, "gated"), (200, 512, 14336, "prepared")),
        )
    ]
    # A decode step of several texts: clusters of blocks and tiles; gates or a residual in the epilogue.
    texts = [
        _case(BipolarFormat(4), 128, m, n, k, _DTYPES[0], layout, is_decoding=True)
        for m in (16, 64)
        for n, k, layout in ((6144, 4096, "prepared"), (4096, 14336, "prepared"), (8192, 1024, "gated"))
    ]
    return (
        many
        + texts
        + [
            _case(
                fmt,
                group_size,
                _TOKENS[index % len(_TOKENS)],
                *_SIZES[index % len(_SIZES)],
                _DTYPES[index // 2 % len(_DTYPES)],
                # Without groups packed weights have another kernel.
                _LAYOUTS[index % len(_LAYOUTS)] if group_size else _LAYOUTS[1 + index % 2],
            )
            for index, (fmt, group_size) in enumerate(weights)
        ]
        + [
            _case(
                fmt,
                group_size,
                _TOKENS[index % len(_TOKENS)],
                *((260, 1536) if kind in BLOCK_TERMS else _SIZES[index % len(_SIZES)]),
                _DTYPES[index // 2 % len(_DTYPES)],
                _LAYOUTS[1 + index % 2],
                kind,
            )
            for index, (fmt, group_size, kind) in enumerate(float_weights)
        ]
    )


def small() -> dict[str, Case]:
    bf16 = ml_dtypes.bfloat16
    return {
        "few float tokens": _case(BipolarFormat(4), 64, 3, 300, 700, bf16, "prepared"),
        "many float tokens": _case(BipolarFormat(4), 64, 140, 300, 700, bf16, "gated"),
        "few float tokens, float groups": _case(BipolarFormat(4), 64, 3, 300, 700, bf16, "prepared", "zeros"),
    }


def _case(
    fmt: BipolarFormat,
    group_size: int | None,
    m: int,
    n: int,
    k: int,
    dtype,
    layout: str,
    kind: FloatTerms | None = None,
    *,
    is_decoding: bool = False,
) -> Case:
    n += n % 2 if layout == "gated" else 0
    for_floats = m % 2 == 0  # either order of tokens

    def make() -> Trial:
        rng = generator(m, n, k)
        scale = rng.uniform(2.0**-10, 2.0**-9, n).astype(np.float32)
        if kind is not None:
            w, values = float_groups(fmt, n, k, group_size, kind, seed=n + k), None
        elif group_size is None:
            codes = codes_with_extremes(fmt, n, k, seed=n + k)
            w, values = array_of_codes(codes, fmt, scale), 2.0 * codes - fmt.max_value
        else:
            groups = random_groups(fmt, n, k, group_size, seed=n + k)
            w, values = array_of_groups(groups, fmt, scale), groups.values.astype(np.float64)
        x, bias = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=n).astype(np.float32)
        wide = x.astype(np.float64)
        w_hat = numbers_of(w) if values is None else values * scale[:, None]
        expected = wide @ w_hat.T + bias
        # Values are exact in both dtypes; sums of k products in float32, one rounding of the output.
        tolerance = rounding(dtype, expected) + 2.0**-19 * (np.abs(wide) @ np.abs(w_hat).T + np.abs(bias))

        if kind is not None and m > FEW_TOKENS_LIMIT:
            # Weights are rounded to the dtype, in units of the largest number of a column.
            unit = 2.0 ** -(8 if dtype == ml_dtypes.bfloat16 else 11)
            tolerance = tolerance + unit * np.abs(wide).sum(1)[:, None] * np.abs(w_hat).max(1)

        activation = Activation("silu", gated=True) if is_decoding and layout == "gated" else None
        if activation is not None:
            # The activation takes a gate and a value of `dtype`; its derivative is below 1.1.
            (gate, up), (gate_error, up_error) = (np.split(each, 2, axis=1) for each in (expected, tolerance))
            activated = gate / (1 + np.exp(-gate))
            tolerance = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(activated) * up_error
            expected = activated * up
            tolerance = tolerance + rounding(dtype, np.abs(expected) + tolerance)
        residual = rng.normal(size=expected.shape).astype(dtype) if is_decoding and activation is None else None
        if residual is not None:
            expected = expected + residual.astype(np.float64)
            tolerance = tolerance + rounding(dtype, np.abs(expected) + tolerance)

        def product(x, w, bias, residual):
            if layout != "packed":
                w = w.prepare(gated=layout == "gated", float_terms=kind, for_floats=for_floats)
            return SM90.weight_only_matmul(x, w, bias, residual, activation)

        def check(y):
            if y.dtype != dtype:
                raise AssertionError(f"dtype {y.dtype}, expected {np.dtype(dtype)}")
            assert_within(y, expected, tolerance)

        return one_program(product, (x, w, bias, residual), check)

    group = "" if group_size is None else f"g{group_size}{kind or ''}"
    shown = layout + " for floats" * (layout != "packed" and for_floats)
    decoding = ", a decode step" if is_decoding else ""
    return Case(f"W{fmt.name}A16{group} {m}x{n}x{k} {np.dtype(dtype).name} {shown}{decoding}", make)

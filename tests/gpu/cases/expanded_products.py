"""Products of prepared weights: integer groups and plain codes, bit for bit the int32 product of decoded values."""

from __future__ import annotations

import itertools

import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import integer_product
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support.integer_products import codes_with_extremes

# m, n, k: ragged, one stage and many, more tiles than multiprocessors.
_SIZES = [(70, 131, 97), (300, 259, 1500), (131, 2051, 2049), (1025, 4099, 640)]
_TILINGS = [
    Tiling(128, 128, "split_n", slots=3),
    Tiling(128, 128, "alternate", slots=3, splits=2),
    Tiling(64, 128, "split_m", slots=4),
    Tiling(64, 128, "split_n", slots=3, splits=4),  # some behind the end of K
]
_GROUP_SIZES = (16, 32, 48, 64, 96, 128, 192, 256)


def cases() -> list[Case]:
    """Every width and group size, without groups, and activations of every width; sizes and tilings in turn."""
    weights = [*itertools.product(range(1, 7), _GROUP_SIZES), *((bits, None) for bits in range(1, 9))]
    chosen = [
        _case(bits, group_size, 8 - index % 8, _SIZES[index % len(_SIZES)], _TILINGS[index // 3 % len(_TILINGS)])
        for index, (bits, group_size) in enumerate(weights)
    ]
    return [*chosen, _case(4, 128, 8, (128, 256, 65_664), _TILINGS[0])]


def small() -> dict[str, Case]:
    return {
        "expanded, groups": _case(4, 64, 8, (70, 300, 700), _TILINGS[0]),
        "expanded, codes": _case(3, None, 8, (70, 300, 700), _TILINGS[1]),
    }


def _case(bits: int, group_size: int | None, a_bits: int, sizes: tuple[int, int, int], tiling: Tiling) -> Case:
    name = f"W{bits}A{a_bits}" + ("" if group_size is None else f"g{group_size}")
    return Case(
        f"{name} {'x'.join(map(str, sizes))} {tiling.tile_m} {tiling.schedule}, {tiling.splits} splits",
        lambda: _trial(BipolarFormat(bits), group_size, BipolarFormat(a_bits), *sizes, tiling),
    )


def _trial(w_format, group_size, a_format, m: int, n: int, k: int, tiling: Tiling) -> Trial:
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
        return integer_product(codes, w.prepare(), a_format, tiling=tiling, interpret=interpret_params())

    def check(out):
        np.testing.assert_array_equal(out[..., 0], expected)

    return one_program(product, (x, w), check, kernel="expanded")

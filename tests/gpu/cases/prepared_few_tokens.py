"""Products of few tokens with prepared weights: bit for bit the int32 product of decoded values."""

from __future__ import annotations

import itertools

import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_integers
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import with_slots
from tests.gpu.trial import Case, Trial, one_program
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support.integer_products import codes_with_extremes

# n, k: ragged, one stage and many, more units than blocks.
_SIZES = [(131, 97), (4096, 1500), (260, 14336), (9001, 640), (28672, 300)]
_TOKENS = (1, 3, 8, 16, 17, 33, 64)
_GROUP_SIZES = (16, 32, 48, 64, 128, 256)
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
        _case(4, 128, 8, 64, 256, 65_664, None),
        _case(2, 64, 8, 8, 4098, 640, None, gated=True),
        # Units that begin at each of the slots of K, several a block.
        _case(8, None, 8, 1, 8200, 4096, None),
    ]


def small() -> dict[str, Case]:
    return {
        "few tokens, prepared groups": _case(4, 64, 8, 3, 300, 700, _TILINGS[0]),
        "few tokens, prepared codes": _case(3, None, 8, 17, 300, 700, _TILINGS[1]),
    }


def _case(bits, group_size, a_bits: int, m: int, n: int, k: int, tiling: FewTokensTiling | None, gated=False) -> Case:
    n += gated and n % 2
    name = f"W{bits}A{a_bits}" + ("" if group_size is None else f"g{group_size}")
    by = "" if tiling is None else f" by {tiling.warpgroups} warpgroups, {tiling.parts} parts, {tiling.cluster} blocks"
    return Case(
        f"{name} {m}x{n}x{k}{' gated' * gated}{by}",
        lambda: _trial(BipolarFormat(bits), group_size, BipolarFormat(a_bits), m, n, k, tiling, gated),
    )


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

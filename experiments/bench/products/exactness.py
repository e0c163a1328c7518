"""Checks whole integer products of every pair of formats on ragged shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt32
from ml_collections import ConfigDict

from bipolar_jax import TERNARY, BipolarArray, BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.ops.dispatch import BACKENDS
from bipolar_jax.packing.words import WORD_BITS
from experiments.support.device_lock import device_unlocked
from experiments.support.progress import console, progress_bar
from experiments.support.timing import compile_all, one_line, raise_if_error

_BATCH = 32  # products compiled together


def measure_exactness(config: ConfigDict, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Sets result["exactness"]: number of compared `products` and `numbers`, of `wrong` products, and `failures`.

    Covers weights of 1 to 8 bits and ternary weights with activations of 1 to 8 bits. Each pair gets
    `config.exactness_shapes` random shapes with sizes up to about `config.exactness_size`, alternating between shapes
    without any multiple of 8 and shapes of few tokens.
    """
    if not config.exactness_shapes:
        return
    requested = {"shapes": config.exactness_shapes, "size": config.exactness_size}
    previous = result.get("exactness", {})
    if previous.get("asked") == requested and previous.get("wrong") == 0:
        return
    rng = np.random.default_rng(config.seed)
    formats = [BipolarFormat(bits) for bits in range(1, 9)]
    cases = [
        (index, a_format, w_format, _ragged_sizes(rng, config.exactness_size, few_tokens=index % 2 == 1))
        for index in range(config.exactness_shapes)
        for w_format in [*formats, TERNARY]
        for a_format in formats
    ]
    numbers, failures = 0, {}
    for start in range(0, len(cases), _BATCH):
        batch = cases[start : start + _BATCH]
        with progress_bar(f"exactness: products {start + 1} to {start + len(batch)} of {len(cases)}"):
            products = {case: _make_product(rng, config.implementation, *case[1:]) for case in batch}
            with device_unlocked():
                compiled = compile_all({case: call for case, (call, _) in products.items()}, config.compile_threads)
            for case, ((_, args), expected) in products.items():
                _, a_format, w_format, sizes = case
                try:
                    wrong = np.count_nonzero(np.asarray(raise_if_error(compiled[case])(*args)) != expected)
                    problem = f"{wrong} of {expected.size} numbers are wrong" if wrong else None
                except Exception as error:
                    problem = one_line(error)
                if problem:
                    failures[f"W{w_format.name}A{a_format.name} {'x'.join(map(str, sizes))}"] = problem
                else:
                    numbers += expected.size
    result["exactness"] = {
        "asked": requested,
        "products": len(cases),
        "exact": len(cases) - len(failures),
        "wrong": len(failures),
        "numbers": numbers,
        "failures": failures,
    }
    save()
    console.print(
        f"exactness: {len(cases) - len(failures)} of {len(cases)} whole products exact ({numbers} numbers)"
        + "".join(f"\n  {name}: {problem}" for name, problem in failures.items())
    )


def _ragged_sizes(rng: np.random.Generator, largest: int, few_tokens: bool) -> tuple[int, int, int]:
    """m, n, k; without few_tokens none is a multiple of 8 (and so not of 32 or 128)."""
    sizes = rng.integers(1, largest + 1, 3)
    if few_tokens:
        sizes[0] = rng.integers(1, min(largest, FEW_TOKENS_LIMIT) + 1)
    else:
        sizes += sizes % 8 == 0
    return tuple(int(size) for size in sizes)


def _make_product(rng: np.random.Generator, implementation: str, a_format, w_format, sizes):
    """A random product as (function, operands), and its exact int64 result.

    Uses NumPy only, since JAX would compile every operation for every shape. The values and the sums of
    their products are exact in float64.
    """
    m, n, k = sizes
    codes = rng.integers(0, a_format.max_value + 1, (m, k), np.uint8)
    w_codes = rng.integers(0, w_format.max_value + 1, (n, k), np.uint8)
    w = BipolarArray(
        planes=_packed(w_codes, w_format),
        scale=np.ones((n, 1), np.float32),
        offset=None,
        row_sums=w_codes.sum(axis=1, dtype=np.int32)[:, None],
        format=w_format,
        contracted_size=k,
        axis=-2,
        group_size=None,
    )
    expected = (2.0 * codes - a_format.max_value) @ (2.0 * w_codes - w_format.max_value).T

    def function(codes, w):
        return BACKENDS[implementation].integer_matmul(codes, w, a_format)[:, :, 0]

    return (function, (codes, w)), expected.astype(np.int64)


def _packed(codes: UInt8[np.ndarray, "n k"], number_format: BipolarFormat) -> UInt32[np.ndarray, "planes n words"]:
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % WORD_BITS)))
    planes = np.stack([number_format.bit(padded, plane) for plane in range(number_format.bits)])
    return np.packbits(planes, axis=-1, bitorder="little").view(np.uint32)

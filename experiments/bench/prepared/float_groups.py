"""Times products with prepared weights whose groups have float scales beside XLA's bf16 dot, on one GPU.

    python -m experiments.bench.prepared.float_groups --out=DIR/float_groups.json

Times are those of the quantized tokens' product. Every product is checked against the exact one of sampled rows and
columns, and few tokens are timed with weights from memory.

Precisions are bits, groups and the form of their terms, such as 4g128zeros; W4A8g128f is 4g128offsets, the form that
`bj.quantize` makes. With --tilings prompts are also timed with every tiling of `TILINGS`, whose sums are scaled, and
with those of `FLOAT_TILINGS`, whose weights are expanded to float16.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarArray
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.sm90.backend.expanded_planning import (
    EXPANDED_CANDIDATES,
    ONE_CHUNK_CANDIDATES,
    SCALED_CANDIDATES,
    fitted,
    scaled_candidates,
)
from bipolar_jax.kernels.sm90.backend.expanded_products import expanded_tokens_matmul
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import tokens_product
from bipolar_jax.kernels.sm90.gemm_expanded.floats.arrays import step_operands
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.bipolar_array import code_sums
from bipolar_jax.packing.fields import STAGE
from bipolar_jax.packing.float_terms import FloatTerms
from bipolar_jax.packing.words import unpack_codes
from bipolar_jax.quantize.groups import num_groups
from experiments.bench.products.cold_weights import with_cold_weights
from experiments.bench.products.expanded import A_FORMAT, Weights, arguments, run_shapes
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Call
from experiments.bench.products.shapes import Shape
from experiments.support.progress import console
from experiments.support.timing import measure, one_line

SHAPES = ",".join(f"{m}x{layer}" for layer in ("28672x4096", "4096x14336") for m in (1, 16, 64, 1024, 2048))
PRECISIONS = "4g128scales,4g128zeros,4g128offsets,4g32zeros,8g128scales"
# Tiling, and lag of the second consumer, by name.
TILINGS = {
    f"{tiling.tile_m} {tiling.schedule}, clusters of {tiling.cluster_m}x{tiling.cluster_n}, "
    f"bands of {tiling.band} {tiling.band_axis}, lag {lag}": (tiling, lag)
    for tiling, lag in (
        *((SCALED_CANDIDATES[0], lag) for lag in (0, 1, 2)),
        (dataclasses.replace(SCALED_CANDIDATES[0], cluster_m=2), 0),
        (dataclasses.replace(SCALED_CANDIDATES[0], cluster_n=2), 0),
        (dataclasses.replace(SCALED_CANDIDATES[0], band=16, band_axis="m"), 0),
        (SCALED_CANDIDATES[1], 0),
        *((ONE_CHUNK_CANDIDATES[0], lag) for lag in (0, 1, 2)),
        (dataclasses.replace(ONE_CHUNK_CANDIDATES[0], cluster_m=2), 0),
        (dataclasses.replace(ONE_CHUNK_CANDIDATES[0], cluster_n=2), 0),
    )
}
FLOAT_TILINGS = {
    f"{tiling.tile_m} {tiling.schedule}, clusters of {tiling.cluster_m}x{tiling.cluster_n}": tiling
    for tiling in (
        *EXPANDED_CANDIDATES,
        dataclasses.replace(EXPANDED_CANDIDATES[0], cluster_m=2),
        dataclasses.replace(EXPANDED_CANDIDATES[0], cluster_n=2),
    )
}
_KINDS = ("scales", "zeros", "offsets")
_LEAST_CHUNK = 32  # that `gemm_expanded` scales the sums of
_PRECISION = re.compile(r"W(\d+)A8g(\d+)f")
_LEAST_BYTES = 200 * 10**6
_WEIGHTS = 1  # which operand


def parse(text: str) -> tuple[Weights, FloatTerms]:
    """Reads "4g128zeros" or "W4A8g128f". Raises ValueError for other notation."""
    text = _PRECISION.sub(r"\1g\2offsets", text)
    for kind in _KINDS:
        if text.endswith(kind):
            return Weights.parse(text.removesuffix(kind)), kind
    raise ValueError(f"a precision is bits, groups and a form, such as 4g128zeros, or W4A8g128f; got {text!r}")


def weights_of(operands: Operands, weights: Weights, kind: FloatTerms) -> tuple[PreparedArray, np.ndarray]:
    """Weights whose scales are few multiples of a power of two, and their numbers for the sampled columns [columns, k].

    Float32 sums of them are nearly exact, and float16 holds each.
    """
    shape, fmt = operands.shape, weights.format
    planes = operands.weights(fmt).planes
    codes = jax.jit(lambda planes: unpack_codes(planes, fmt, shape.k))(planes)
    rng, size = np.random.default_rng(weights.bits), (shape.n, num_groups(shape.k, weights.group_size))
    scale, offset = rng.integers(1, 4, size) * np.float32(2.0**-10), None
    if kind == "zeros":
        offset = scale * (fmt.max_value - 2 * rng.integers(0, fmt.max_value + 1, size)).astype(np.float32)
    elif kind == "offsets":
        offset = rng.integers(-8, 9, size) * np.float32(2.0**-10)
    sums = jax.jit(lambda codes: code_sums(codes, weights.group_size))(codes)
    terms = (jnp.asarray(scale, jnp.float32), None if offset is None else jnp.asarray(offset, jnp.float32))
    w = BipolarArray(planes, *terms, sums, fmt, shape.k, -2, weights.group_size).prepare(float_terms=kind)
    group = np.arange(shape.k) // weights.group_size
    columns = operands.columns
    numbers = scale[columns][:, group] * (2.0 * np.asarray(codes[columns], np.float64) - fmt.max_value)
    return w, numbers if offset is None else numbers + offset[columns][:, group]


def product_of(operands: Operands, weights: Weights, kind: FloatTerms) -> tuple[Call, np.ndarray]:
    """The product, and the exact numbers of the sampled rows and columns."""
    of_tokens = operands.tokens(A_FORMAT)
    tokens = PackedTokens(operands.x_words(A_FORMAT, "int8"), of_tokens.scale, of_tokens.zero_code, of_tokens.code_sums)
    zero_code, scale = (np.asarray(t, np.float64)[operands.rows, None] for t in (tokens.zero_code, tokens.scale))
    x = 2 * scale * (np.asarray(operands.codes(A_FORMAT)[operands.rows], np.float64) - zero_code)
    w, numbers = weights_of(operands, weights, kind)

    def product(tokens, w):
        return expanded_tokens_matmul(tokens, w, A_FORMAT, None, jnp.dtype(jnp.bfloat16))

    return (product, (tokens, w)), x @ numbers.T


def other_ways(call: Call) -> dict[str, Call]:
    """The same product with every tiling."""
    _, (tokens, w) = call
    ways = {}
    sizes = {tiling.tile_m for tiling in scaled_candidates(w)}
    for name, (tiling, lag) in TILINGS.items() if math.gcd(w.group_size, STAGE) >= _LEAST_CHUNK else ():
        if tiling.tile_m not in sizes:
            continue

        def product(tokens, w, tiling=tiling, lag=lag):
            fits = fitted(tiling, w, itemsize=2, is_float=False)
            options = {"tiling": fits, "lag": lag, "interpret": interpret_params()}
            return tokens_product(tokens, w, A_FORMAT, None, jnp.dtype(jnp.bfloat16), **options)

        ways[name] = (product, (tokens, w))
    for name, tiling in FLOAT_TILINGS.items():

        def float_product(tokens, w, tiling=tiling):
            options = {"tiling": fitted(tiling, w, itemsize=2, is_float=True), "interpret": interpret_params()}
            return expanded_matmul(*step_operands(tokens, w, A_FORMAT, None), jnp.dtype(jnp.bfloat16), **options)

        ways[f"float16, {name}"] = (float_product, (tokens, w))
    return ways


def check(product: jax.Array, exact: np.ndarray, operands: Operands) -> None:
    """Raises ValueError unless the sampled numbers are the exact ones, but for bfloat16's rounding and float32's."""
    found = np.asarray(product[operands.rows][:, operands.columns], np.float64)
    wrong = np.abs(found - exact) > 2.0**-8 * np.abs(exact) + 2.0**-12 * np.mean(np.abs(exact))
    if wrong.any():
        raise ValueError(f"{wrong.sum()} of {wrong.size} sampled numbers are wrong, such as {found[wrong][0]}")


def measured(call: Call, few: bool, iterations: int) -> dict[str, Any]:
    """Figures of a call, of few tokens with its weights from memory."""
    if not few:
        function, args = call
        return measure(jax.jit(function), *args, iterations=iterations).to_json()
    (function, args), count = with_cold_weights(call, _WEIGHTS, _LEAST_BYTES)
    return measure(jax.jit(function), *args, iterations=iterations).divided(count).to_json()


def measure_shape(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of bf16 and of every precision; an error's text where one failed."""
    operands, few = Operands(shape, seed=0), shape.m <= FEW_TOKENS_LIMIT
    row: dict[str, Any] = {"bf16": measured((jnp.dot, (operands.x, operands.dense_w)), few, options.iterations)}
    console.print(f"{shape.name}: bf16 {row['bf16']['microseconds']:.1f} us")
    for text in options.precisions.split(","):
        call, exact = product_of(operands, *parse(text))
        w = call[1][1]
        ways = {"": call} | (other_ways(call) if options.tilings and not few else {})
        for way, (function, args) in ways.items():
            name = f"{text}, {way}" if way else text
            try:
                check(jax.jit(function)(*args), exact, operands)
                row[name] = measured((function, args), few, options.iterations)
            except Exception as error:
                row[name] = {"error": one_line(error)}
                console.print(f"  {name}: {row[name]['error']}")
                continue
            time, nbytes = row[name]["microseconds"], w.words.nbytes + w.terms.nbytes
            speed = row["bf16"]["microseconds"] / time
            console.print(f"  {name} {time:.1f} us, {nbytes / time / 1e3:.0f} GB/s, {speed:.2f}x bf16")
    return row


def main() -> None:
    parser = arguments(__doc__, SHAPES, PRECISIONS, iterations=10)
    parser.add_argument("--tilings", action="store_true", help="time prompts with every tiling too")
    options = parser.parse_args()
    run_shapes(options, lambda shape: measure_shape(shape, options))


if __name__ == "__main__":
    main()

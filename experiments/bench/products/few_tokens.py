"""Times the product of few tokens with prepared weights beside XLA's bf16 dot, on one GPU.

    python -m experiments.bench.products.few_tokens --out=DIR/few_tokens.json

Every product is checked against the exact one of sampled rows and columns, and timed with weights from memory: calls
rotate through copies of at least 200 MB, or 12. "GB/s" counts the weights and the terms of their groups. From 17 tokens
on `gemm_expanded` is timed beside it, with and without splits of K.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarArray
from bipolar_jax.kernels.sm90.backend.expanded_planning import expanded_times
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling, with_slots
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.words import unpack_codes
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.products.cold_weights import with_cold_weights
from experiments.bench.products.expanded import A_FORMAT, Weights, arguments, check, run_shapes
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Call
from experiments.bench.products.shapes import Shape
from experiments.support.progress import console
from experiments.support.timing import compile_all, measure, one_line, raise_if_error

SHAPES = ",".join(f"{m}x{layer}" for layer in ("28672x4096", "4096x14336") for m in (1, 8, 16, 64))
PRECISIONS = "4g128,4g64,4,3g128,2g64,1g128"
_LEAST_BYTES = 200 * 10**6
_WEIGHTS = 1  # which operand
_FEWEST_EXPANDED, _EXPANDED_TOKENS = 16, 64  # tokens: from how many on `gemm_expanded` is timed, and of its tiles


def product_of(
    operands: Operands, weights: Weights
) -> tuple[tuple[PackedTokens, Any], dict[str, FewTokensTiling | Tiling], np.ndarray]:
    """Operands of the product, its tilings by name, the first the one that is chosen, and the exact sample."""
    shape, w_format = operands.shape, weights.format
    planes = operands.weights(w_format).planes
    codes = np.asarray(jax.jit(lambda planes: unpack_codes(planes, w_format, shape.k))(planes))
    terms = weights.terms(shape)
    sums = weights.values(codes, terms, slice(None)).sum(1) if terms else codes.sum(1, dtype=np.int64)
    groups = IntegerGroups(*terms.values()) if terms else None
    w = BipolarArray(
        planes,
        jnp.full((shape.n, 1), 2.0**-10),
        None,
        jnp.asarray(sums, jnp.int32)[:, None],
        w_format,
        shape.k,
        -2,
        weights.group_size,
        groups,
    ).prepare()
    of_tokens = operands.tokens(A_FORMAT)
    token_terms = of_tokens.scale, of_tokens.zero_code, of_tokens.code_sums
    tokens = PackedTokens(operands.x_words(A_FORMAT, "int8"), *token_terms)
    zero_code, scale = (np.asarray(t, np.float64)[operands.rows, None] for t in (tokens.zero_code, tokens.scale))
    x = np.asarray(operands.codes(A_FORMAT)[operands.rows], np.float64) - zero_code
    exact = 2.0**-9 * scale * (x @ weights.values(codes[operands.columns], terms, operands.columns).T)
    return (tokens, w), tilings_of(shape, w.bits, w.chunks) | expanded_tilings(shape, w), exact


def expanded_tilings(shape: Shape, w: PreparedArray, *, is_float: bool = False) -> dict[str, Tiling]:
    """By name, the tilings of `gemm_expanded` that its cost model likes best, with K whole and split.

    With `is_float` they are those of 16-bit floats.
    """
    if shape.m <= _FEWEST_EXPANDED:
        return {}
    times = expanded_times(shape.m, w, jnp.dtype(jnp.bfloat16), is_float=is_float)
    best = {}
    for tiling in sorted(times, key=times.get):
        best.setdefault((tiling.schedule, tiling.splits > 1), tiling)
    return {
        f"expanded, {t.tile_m} {t.schedule}, {t.slots} slots, {t.splits} splits": t
        for t in best.values()
        if t.tile_m == _EXPANDED_TOKENS
    }


def tilings_of(shape: Shape, bits: int, chunks: int, rows_of_stage: int = 1) -> dict[str, FewTokensTiling]:
    """The tiling that is chosen, and others that fit; arguments as of `few_tokens_tiling`."""
    rows = {"rows_of_stage": rows_of_stage}
    chosen = few_tokens_tiling(shape.m, shape.n, shape.k, bits, chunks, **rows)
    others = [
        with_slots(FewTokensTiling(warpgroups, parts, depth, cluster=cluster), shape.m, bits, chunks, **rows)
        for cluster, all_parts in ((1, (1, 2, 4, 7)), (2, (1, 2, 3)), (4, (1, 4)))
        for parts in all_parts
        for warpgroups in (1, 2, 3, 4)
        for depth in (1, 2)
    ]
    tilings = [chosen, *(tiling for tiling in others if tiling.slots >= 2 and tiling != chosen)]
    return {
        f"{t.warpgroups} warpgroups, {t.parts} parts, depth {t.depth}, {t.slots} slots, {t.cluster} blocks": t
        for t in tilings
    }


def call(operands: tuple[PackedTokens, Any], tiling: FewTokensTiling | Tiling) -> Call:
    """The product as a function of its operands."""
    multiply = tokens_product if isinstance(tiling, Tiling) else few_tokens_product

    def product(tokens, w):
        return multiply(tokens, w, A_FORMAT, None, jnp.bfloat16, tiling=tiling, interpret=interpret_params())

    return product, operands


def timed(call: Call, position: int, iterations: int) -> dict[str, Any]:
    """Figures of a call with its weights from memory."""
    (function, args), count = with_cold_weights(call, position, _LEAST_BYTES)
    return measure(jax.jit(function), *args, iterations=iterations).divided(count).to_json()


def measure_shape(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of bf16, and of every precision and tiling; an error's text where one failed."""
    operands = Operands(shape, seed=0)

    def is_wanted(name: str) -> bool:
        return options.tune is not None and options.tune in name

    row: dict[str, Any] = {"bf16": timed((jnp.dot, (operands.x, operands.dense_w)), 1, options.iterations)}
    console.print(f"{shape.name}: bf16 {row['bf16']['microseconds']:.1f} us")
    for text in options.precisions.split(","):
        args, tilings, exact = product_of(operands, Weights.parse(text))
        first, *others = tilings.items()
        tilings = dict([first, *(pair for pair in others if isinstance(pair[1], Tiling) or is_wanted(pair[0]))])
        compiled = compile_all({name: call(args, tiling) for name, tiling in tilings.items()}, options.threads)
        figures: dict[str, Any] = {}
        for name, tiling in tilings.items():
            try:
                check(raise_if_error(compiled[name])(*args), exact, operands)
                figures[name] = timed(call(args, tiling), _WEIGHTS, options.iterations)
            except Exception as error:
                figures[name] = {"error": one_line(error)}
                console.print(f"    {name}: {figures[name]['error']}")
        row[text] = figures
        times = {name: figure["microseconds"] for name, figure in figures.items() if "microseconds" in figure}
        nbytes = sum(leaf.nbytes for leaf in (args[1].words, args[1].terms) if leaf is not None)
        for name in dict.fromkeys([*list(times)[:1], *sorted(times, key=times.get)[:3]]):
            speed = row["bf16"]["microseconds"] / times[name]
            console.print(
                f"  W{text}A8 {times[name]:.1f} us, {nbytes / times[name] / 1e3:.0f} GB/s, {speed:.2f}x bf16, {name}"
            )
    return row


def main() -> None:
    parser = arguments(__doc__, SHAPES, PRECISIONS, iterations=10)
    parser.add_argument(
        "--tune",
        nargs="?",
        const="",
        help='time other tilings, too, or those named by, say, "1 parts, depth 1"; the first is the chosen one',
    )
    options = parser.parse_args()
    run_shapes(options, lambda shape: measure_shape(shape, options))


if __name__ == "__main__":
    main()

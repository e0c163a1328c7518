"""Times the product of prepared weights beside the int8 product of expanded bytes and XLA's bf16 dot, on one GPU.

    python -m experiments.bench.products.expanded --out=DIR/expanded.json

For every shape and precision all tilings of `TILINGS` that fit are compiled, checked against the exact product of
sampled rows and columns, and timed. "gemm" is `packed_matmul` with one scale a column, on bytes that are expanded
already; "gemm and expansion" expands four planes first, as prompts of W4A8 do without groups.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.expanded_planning import plan_many_tokens
from bipolar_jax.kernels.sm90.backend.planning import plan_product
from bipolar_jax.kernels.sm90.core.execution import check_runnable, interpret_params
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.weight_prep.expand import expand
from bipolar_jax.packing.words import unpack_codes
from bipolar_jax.quantize.groups import num_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Call
from experiments.bench.products.shapes import Shape, parse_shapes
from experiments.support.progress import console
from experiments.support.timing import compile_all, measure, one_line, raise_if_error

SHAPES = "2048x14336x4096,1024x28672x4096,1024x4096x14336,8192x8192x8192"
PRECISIONS = "4,4g128,4g64,4g32,3g128,2g64,1g128,6g128"
# Tiling, and lag of the second consumer, by name.
TILINGS = {
    f"{tiling.tile_m} {tiling.schedule}, {tiling.slots} slots, clusters of {tiling.cluster_m}x{tiling.cluster_n}, "
    f"bands of {tiling.band} {tiling.band_axis}, lag {lag}": (tiling, lag)
    for tiling, lag in (
        *((Tiling(128, 128, "split_n", slots=4), lag) for lag in range(4)),
        *((Tiling(128, 128, "split_n", slots=5), lag) for lag in (0, 2, 4)),
        *((Tiling(128, 128, "split_n", slots=4, band=16, band_axis="m"), lag) for lag in (0, 2)),
        (Tiling(128, 128, "split_n", slots=4, cluster_m=2), 0),
        (Tiling(128, 128, "split_n", slots=4, cluster_n=2), 0),
        (Tiling(128, 128, "alternate", slots=6), 0),
        *((Tiling(64, 128, "split_n", slots=6), lag) for lag in (0, 2)),
        *((Tiling(tile_m, 128, "split_n", slots=5), 0) for tile_m in (80, 96, 112)),
        *((Tiling(tile_m, 128, "alternate", slots=7), 0) for tile_m in (80, 96, 112)),
        *((Tiling(tile_m, 128, "split_n", slots=slots), 0) for tile_m in (144, 160) for slots in (4, 3)),
        *((Tiling(tile_m, 128, "alternate", slots=slots), 0) for tile_m in (144, 160) for slots in (6, 5)),
        (Tiling(64, 128, "alternate", slots=8), 0),
    )
}
A_FORMAT = BipolarFormat(8)
_TOLERANCE = 2.0**-8 + 2.0**-20  # bf16's half step, and float32 roundings


@dataclasses.dataclass(frozen=True)
class Weights:
    """Random weights of one precision: planes, and s and o of every group."""

    bits: int
    group_size: int | None

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Reads "4" or "4g128"."""
        bits, _, group_size = text.partition("g")
        return cls(int(bits), int(group_size) if group_size else None)

    @property
    def format(self) -> BipolarFormat:
        return BipolarFormat(self.bits)

    def terms(self, shape: Shape) -> dict[str, jax.Array]:
        """s and o with which s * u + o takes any byte; empty without groups."""
        if self.group_size is None:
            return {}
        rng = np.random.default_rng(self.bits)
        size = (shape.n, num_groups(shape.k, self.group_size))
        scale = rng.integers(1, 255 // self.format.max_value + 1, size)
        offset = rng.integers(-128, 128 - scale * self.format.max_value)
        return {
            "group_scale": jnp.asarray(scale, jnp.uint8),
            "group_offset": jnp.asarray(offset, jnp.int8),
        }

    def values(self, codes: np.ndarray, terms: dict[str, jax.Array], columns: np.ndarray | slice) -> np.ndarray:
        """The integers that codes [columns, k] stand for."""
        if self.group_size is None:
            return 2 * codes.astype(np.int64) - self.format.max_value
        group = np.arange(codes.shape[1]) // self.group_size
        scale, offset = (np.asarray(term)[columns][:, group].astype(np.int64) for term in terms.values())
        return scale * codes + offset


def calls(operands: Operands, weights: Weights, chosen_only: bool = False) -> tuple[dict[str, Call], np.ndarray]:
    """The kernel with every tiling or the planned one, and the exact numbers of the sampled rows and columns."""
    shape, w_format = operands.shape, weights.format
    planes = operands.weights(w_format).planes
    codes = np.asarray(jax.jit(lambda planes: unpack_codes(planes, w_format, shape.k))(planes))
    terms = weights.terms(shape)
    column_sums = weights.values(codes, terms, slice(None)).sum(1) if terms else codes.sum(1, dtype=np.int64)
    column_sums = jnp.asarray(column_sums, jnp.int32)
    scale = jnp.full((shape.n, 1), 2.0**-10)
    groups = IntegerGroups(*terms.values()) if terms else None
    w = BipolarArray(planes, scale, None, column_sums[:, None], w_format, shape.k, -2, weights.group_size, groups)
    prepared = w.prepare()
    recovery = ExpandedRecovery("int8", A_FORMAT, w_format, shape.k, True, prepared.terms is not None)
    x_words, tokens = operands.x_words(A_FORMAT, "int8"), operands.tokens(A_FORMAT)
    columns = ColumnTerms(code_sums=column_sums, scale=scale[:, 0])

    def multiply(tiling: Tiling, lag: int):
        def product(x_words, prepared, tokens, columns):
            return expanded_matmul(
                x_words,
                prepared,
                tokens,
                columns,
                recovery,
                jnp.bfloat16,
                tiling=tiling,
                lag=lag,
                interpret=interpret_params(),
            )

        return product

    args = (x_words, prepared, tokens, columns)
    zero_code, scale = (np.asarray(term, np.float64)[operands.rows, None] for term in (tokens.zero_code, tokens.scale))
    x = np.asarray(operands.codes(A_FORMAT)[operands.rows], np.float64) - zero_code
    exact = 2.0**-9 * scale * (x @ weights.values(codes[operands.columns], terms, operands.columns).T)
    tilings = TILINGS
    if chosen_only:
        choice = plan_many_tokens(shape.m, prepared, jnp.bfloat16)
        tilings = {f"{choice.tiling.tile_m} {choice.tiling.schedule}, {choice.tiling.slots} slots": (choice.tiling, 0)}
    return {name: (multiply(*tiling), args) for name, tiling in tilings.items()}, exact


def baselines(operands: Operands) -> dict[str, Call]:
    """The int8 product with and without the expansion of four planes, and XLA's bf16 dot."""
    shape, w_format = operands.shape, BipolarFormat(4)
    recovery = Recovery("int8", A_FORMAT, w_format, shape.k, with_zero=True)
    tiling = plan_product(shape.m, shape.n, shape.k, A_FORMAT, w_format).tiling
    planes, x_words = operands.weights(w_format).planes, operands.x_words(A_FORMAT, "int8")
    w_words = jax.jit(lambda planes: expand(planes, w_format, interpret=interpret_params()))(planes)
    columns, tokens = operands.column_terms(w_format), operands.tokens(A_FORMAT)

    def gemm(x_words, w_words, tokens, columns):
        return packed_matmul(
            x_words, w_words, tokens, columns, recovery, tiling, jnp.bfloat16, interpret=interpret_params()
        )

    def expand_first(x_words, planes, tokens, columns):
        return gemm(x_words, expand(planes, w_format, interpret=interpret_params()), tokens, columns)

    return {
        "gemm": (gemm, (x_words, w_words, tokens, columns)),
        "gemm and expansion": (expand_first, (x_words, planes, tokens, columns)),
        "bf16": (jnp.dot, (operands.x, operands.dense_w)),
    }


def check(product: jax.Array, exact: np.ndarray, operands: Operands) -> None:
    """Raises ValueError unless the sampled numbers are the exact ones, rounded."""
    found = np.asarray(product[operands.rows][:, operands.columns], np.float64)
    wrong = np.abs(found - exact) > _TOLERANCE * np.abs(exact)
    if wrong.any():
        raise ValueError(f"{wrong.sum()} of {wrong.size} sampled numbers are wrong, such as {found[wrong][0]}")


def measure_shape(
    shape: Shape, precisions: list[str], iterations: int, threads: int, chosen_only: bool
) -> dict[str, Any]:
    """Microseconds of the baselines, and of every precision and tiling; an error's text where one failed."""
    operands = Operands(shape, seed=0)
    row: dict[str, Any] = {}
    reference = compile_all(baselines(operands), threads)
    for name, (_, args) in baselines(operands).items():
        row[name] = measure(raise_if_error(reference[name]), *args, iterations=iterations).to_json()
    console.print(f"{shape}: " + ", ".join(f"{name} {row[name]['microseconds']:.1f} us" for name in reference))
    for text in precisions:
        todo, exact = calls(operands, Weights.parse(text), chosen_only)
        figures: dict[str, Any] = {}
        compiled = compile_all(todo, threads)
        for name, (_, args) in todo.items():
            try:
                function = raise_if_error(compiled[name])
                check(function(*args), exact, operands)
                figures[name] = measure(function, *args, iterations=iterations).to_json()
            except Exception as error:
                figures[name] = {"error": one_line(error)}
        row[text] = figures
        timed = {name: figure["microseconds"] for name, figure in figures.items() if "microseconds" in figure}
        errors = {figure["error"] for figure in figures.values() if "error" in figure}
        if timed:
            best = min(timed, key=timed.get)
            speed = row["bf16"]["microseconds"] / timed[best]
            console.print(f"  W{text}A8 {timed[best]:.1f} us, {speed:.2f}x bf16, {best}")
        for error in sorted(errors):
            console.print(f"    {error}")
    return row


def arguments(description: str, shapes: str, precisions: str, iterations: int) -> argparse.ArgumentParser:
    """What the programs that time prepared weights have in common, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=shapes, help="m x n x k, with commas")
    parser.add_argument("--precisions", default=precisions, help="bits of weights, and groups as in 4g128")
    parser.add_argument("--iterations", type=int, default=iterations)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


def run_shapes(options: argparse.Namespace, measure: Callable[[Shape], dict[str, Any]]) -> None:
    """Measures the shapes one after the other; the file has what is known after each."""
    check_runnable()
    result = {"device": jax.devices()[0].device_kind, "shapes": {}}
    for shape in parse_shapes(options.shapes):
        result["shapes"][shape.name] = measure(shape)
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1))


def main() -> None:
    parser = arguments(__doc__, SHAPES, PRECISIONS, iterations=20)
    parser.add_argument("--chosen", action="store_true", help="time the tiling that is planned alone")
    options = parser.parse_args()
    settings = options.precisions.split(","), options.iterations, options.threads, options.chosen
    run_shapes(options, lambda shape: measure_shape(shape, *settings))


if __name__ == "__main__":
    main()

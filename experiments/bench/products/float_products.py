"""Times products of float activations with prepared weights beside XLA's bf16 dot, on one GPU.

    python -m experiments.bench.products.float_products --out=DIR/float_products.json

The whole operation is timed, from bfloat16 to bfloat16, checked against the exact product of sampled rows and columns.
Of up to 64 tokens weights come from memory: calls rotate through copies. Of more, "XLA" is the same operation, of
packed weights, by the backend that serves every device. With --tilings every tiling with K whole is timed, wider ones
than the planner takes too, and the best with K split by the planner's model; of up to 64 tokens those of few tokens
with the most warps that multiply, and from 17 on the best of `gemm_expanded`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarArray
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.sm90.backend import float_products
from bipolar_jax.kernels.sm90.backend.expanded_planning import EXPANDED_CANDIDATES, fitted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.ops.dispatch import BACKENDS
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.words import unpack_codes
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.products import few_tokens
from experiments.bench.products.cold_weights import with_cold_weights
from experiments.bench.products.expanded import Weights, arguments, run_shapes
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Call
from experiments.bench.products.shapes import Shape
from experiments.support.progress import console
from experiments.support.timing import compile_all, measure, one_line, raise_if_error

SHAPES = ",".join(
    f"{m}x{layer}" for layer in ("28672x4096", "4096x14336", "6144x4096") for m in (1, 8, 16, 64, 128, 256, 1024, 7680)
)
PRECISIONS = "4g128,4g64,2g64"
PARTS = ("tokens",)  # of the operation
_LEAST_BYTES = 200 * 10**6
_WEIGHTS = 1  # which operand
_ENOUGH_SLOTS = 3  # of a ring buffer
_WIDTH_STEP, _MOST_TOKENS = 16, 160  # of tiles wider than the planner's
_MOST_SPLIT = 10  # tilings with K split: those that the planner's model likes best
_TOLERANCE = 2.0**-8 + 2.0**-20  # bf16's half step, and float32 roundings


def weights_of(operands: Operands, weights: Weights) -> tuple[BipolarArray, np.ndarray, np.ndarray]:
    """Packed weights; and the exact sample of the product, with the sizes of its terms."""
    shape, w_format = operands.shape, weights.format
    planes = operands.weights(w_format).planes
    codes = np.asarray(jax.jit(lambda planes: unpack_codes(planes, w_format, shape.k))(planes))
    terms = weights.terms(shape)
    sums = weights.values(codes, terms, slice(None)).sum(1) if terms else codes.sum(1, dtype=np.int64)
    groups = IntegerGroups(*terms.values()) if terms else None
    static = (w_format, shape.k, -2, weights.group_size, groups)
    w = BipolarArray(planes, jnp.full((shape.n, 1), 2.0**-10), None, jnp.asarray(sums, jnp.int32)[:, None], *static)
    x = np.asarray(operands.x[operands.rows], np.float64)
    values = 2.0**-10 * weights.values(codes[operands.columns], terms, operands.columns)
    return w, x @ values.T, np.abs(x) @ np.abs(values).T


def calls(operands: Operands, w: BipolarArray, *, tilings: bool = False) -> dict[str, Call]:
    """The product of prepared weights, what it contains, other ways, and XLA's."""
    prepared = jax.jit(functools.partial(BipolarArray.prepare, for_floats=True))(w)

    def product(x, w):
        return float_products.weight_only_matmul(x, w, None)

    todo: dict[str, Call] = {"prepared": (product, (operands.x, prepared))}
    m = operands.shape.m
    if m <= FEW_TOKENS_LIMIT:
        named = tilings_of_few_tokens(operands.shape, prepared) if tilings else {}
        return todo | {name: _by_tiling(tiling, operands.x, prepared) for name, tiling in named.items()}

    todo["XLA"] = (lambda x, w: BACKENDS["xla"].weight_only_matmul(x, w, None), (operands.x, w))
    times = float_products.tiling_times(m, prepared) if tilings else {}
    split = sorted((tiling for tiling in times if tiling.splits > 1), key=times.get)[:_MOST_SPLIT]
    whole = sorted((tiling for tiling in times if tiling.splits == 1 or tiling in split), key=times.get)
    for tiling in [*whole, *(wider_tilings(prepared) if tilings else [])]:
        name = f"{tiling.tile_m} {tiling.schedule}, {tiling.slots} slots, {tiling.splits} splits"
        todo[name] = _by_tiling(tiling, operands.x, prepared)
    return todo


def wider_tilings(w: PreparedArray) -> list[Tiling]:
    """Tilings of more tokens than the planner takes, with as many slots as fit."""
    most = EXPANDED_CANDIDATES[0].tile_m
    return [
        fitted(dataclasses.replace(tiling, tile_m=tile_m), w, itemsize=2, is_float=True)
        for tiling in EXPANDED_CANDIDATES
        if tiling.tile_m == most
        for tile_m in range(most + _WIDTH_STEP, _MOST_TOKENS + 1, _WIDTH_STEP)
    ]


def tilings_of_few_tokens(shape: Shape, w: PreparedArray) -> dict[str, FewTokensTiling | Tiling]:
    """By name, tilings of up to 64 tokens: of parts and clusters the one with the most workers, and `gemm_expanded`'s.

    The first one is that which `few_tokens_tiling` chooses.
    """
    few = few_tokens.tilings_of(shape, w.bits, w.chunks, rows_of_stage=2)
    chosen, *others = few.items()
    best = {(chosen[1].parts, chosen[1].cluster): chosen}
    for name, tiling in sorted(others, key=lambda other: (other[1].slots < _ENOUGH_SLOTS, -other[1].workers)):
        best.setdefault((tiling.parts, tiling.cluster), (name, tiling))
    return dict(best.values()) | few_tokens.expanded_tilings(shape, w, is_float=True)


def _by_tiling(tiling: FewTokensTiling | Tiling, x: jax.Array, w: PreparedArray) -> Call:
    def product(x, w):
        return float_products.weight_only_matmul(x, w, None, tiling=tiling)

    return product, (x, w)


def check(product: jax.Array, exact: np.ndarray, sizes: np.ndarray, operands: Operands) -> None:
    """Raises ValueError unless the sampled numbers are the exact ones but for float32 sums and one rounding."""
    found = np.asarray(product[operands.rows][:, operands.columns], np.float64)
    wrong = np.abs(found - exact) > _TOLERANCE * np.abs(exact) + 2.0**-19 * sizes
    if wrong.any():
        raise ValueError(f"{wrong.sum()} of {wrong.size} sampled numbers are wrong, such as {found[wrong][0]}")


def timed(call: Call, shape: Shape, iterations: int, compiled: Any) -> dict[str, Any]:
    """Figures of a call; of few tokens with weights from memory."""
    if shape.m > FEW_TOKENS_LIMIT:
        return measure(raise_if_error(compiled), *call[1], iterations=iterations).to_json()
    (function, args), count = with_cold_weights(call, _WEIGHTS, _LEAST_BYTES)
    return measure(jax.jit(function), *args, iterations=iterations).divided(count).to_json()


def measure_shape(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of bf16, and of every precision; an error's text where one failed."""
    operands = Operands(shape, seed=0)
    dense: Call = (jnp.dot, (operands.x, operands.dense_w))
    row: dict[str, Any] = {"bf16": timed(dense, shape, options.iterations, compile_all({"bf16": dense}, 1)["bf16"])}
    console.print(f"{shape.name}: bf16 {row['bf16']['microseconds']:.1f} us")
    for text in options.precisions.split(","):
        w, exact, sizes = weights_of(operands, Weights.parse(text))
        todo = calls(operands, w, tilings=options.tilings)
        compiled, figures = compile_all(todo, options.threads), {}
        for name, call in todo.items():
            try:
                product = raise_if_error(compiled[name])(*call[1])
                if name not in PARTS:
                    check(product, exact, sizes, operands)
                figures[name] = timed(call, shape, options.iterations, compiled[name])
                time = figures[name]["microseconds"]
                speed = f"{row['bf16']['microseconds'] / time:.2f}x bf16"
                console.print(f"  W{text}A16 {name} {time:.1f} us" + ("" if name in PARTS else f", {speed}"))
            except Exception as error:
                figures[name] = {"error": one_line(error)}
                console.print(f"    {name}: {figures[name]['error']}")
        row[text] = figures
    return row


def main() -> None:
    parser = arguments(__doc__, SHAPES, PRECISIONS, iterations=10)
    parser.add_argument(
        "--tilings", action="store_true", help="time every tiling of the kernel that expands in registers"
    )
    options = parser.parse_args()
    run_shapes(options, lambda shape: measure_shape(shape, options))


if __name__ == "__main__":
    main()

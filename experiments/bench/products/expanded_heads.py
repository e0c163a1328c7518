"""Times the heads of prompts that leave the product of prepared weights, beside the same product as a matrix.

    python -m experiments.bench.products.expanded_heads --out=DIR/expanded_heads.json

The kernel's time alone: not the copy of caches that are not donated here. For every model all tilings of
`EXPANDED_TILINGS` are checked against the matrix, rotated by XLA, and timed. "gemm" is the product of bytes that are
expanded already, whose output is heads, with one scale a column.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.kernels.semantics.rotation import STEPS_PER_UNIT, fixed_point_tables
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.expanded_planning import problem_of
from bipolar_jax.kernels.sm90.backend.planning import plan_heads
from bipolar_jax.kernels.sm90.core.execution import check_runnable, interpret_params
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm_expanded.heads import with_room_for_heads
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.projections.prompt_projection import (
    EXPANDED_TILINGS,
    project_expanded_heads,
    project_heads,
)
from bipolar_jax.kernels.sm90.weight_prep.expand import expand
from bipolar_jax.models.blocks.attention import rotated_heads
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.products.expanded import Weights
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Call
from experiments.bench.products.shapes import Shape
from experiments.support.kernel_times import profile_kernels
from experiments.support.progress import console
from experiments.support.timing import compile_all, one_line, raise_if_error

A_FORMAT = BipolarFormat(8)
# Roundings of bf16, and of float32 in another order.
_TOLERANCE = 2.0**-7


@dataclasses.dataclass(frozen=True)
class Model:
    """The joined projection of a model, and prompts of it.

    Attributes:
      tokens: of one prompt.
      hidden: contracted size.
      queries, keys: heads.
      size: of a head.
    """

    tokens: int
    hidden: int
    queries: int
    keys: int
    size: int

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(self.queries, self.keys, self.size, self.tokens)

    @property
    def shape(self) -> Shape:
        return Shape("qkv", self.tokens, self.layout.columns, self.hidden)


MODELS = {
    "llama3-8b": Model(2048, 4096, 32, 8, 128),
    "llama2-7b": Model(1024, 4096, 32, 32, 128),
    "smollm2-135m": Model(2048, 576, 9, 3, 64),
}


def calls(model: Model, weights: Weights) -> dict[str, Call]:
    """The reference "rotated by XLA", then what is timed, by name."""
    operands, layout = Operands(model.shape, seed=0), model.layout
    k, w_format = model.hidden, weights.format
    w, w4 = _packed(operands, weights), operands.weights(BipolarFormat(4))
    prepared, columns = w.prepare(), ColumnTerms(code_sums=w.row_sums[:, 0], scale=w.scale[:, 0])
    x_words, tokens = operands.x_words(A_FORMAT, "int8"), operands.tokens(A_FORMAT)
    recovery = ExpandedRecovery("int8", A_FORMAT, w_format, k, True, prepared.terms is not None)
    angles = np.outer(np.arange(model.tokens), 10_000.0 ** -(np.arange(layout.half) / layout.half))
    tables = fixed_point_tables(tuple(jnp.asarray(f(angles)[None], jnp.float32) for f in (np.cos, np.sin)), 1)
    caches = [jnp.zeros((1, 1, layout.keys, layout.capacity, layout.size), jnp.bfloat16)] * 2
    rest = (*caches, jnp.int32(0), tables)
    options = {"length": model.tokens, "interpret": interpret_params()}

    def product(tiling, dtype, x_words, prepared, tokens, columns):
        options = {"tiling": tiling, "interpret": interpret_params()}
        return expanded_matmul(x_words, prepared, tokens, columns, recovery, dtype, **options)

    def by_xla(x_words, prepared, tokens, columns, tables):
        matrix = product(tilings[0], jnp.dtype(jnp.float32), x_words, prepared, tokens, columns)
        tables = tuple(table.astype(jnp.float32)[None] / STEPS_PER_UNIT for table in tables)
        heads = rotated_heads((matrix.reshape(1, model.tokens, -1, layout.size),), layout.keys, tables)
        return tuple(each.astype(jnp.bfloat16) for each in heads)

    def heads(tiling, x_words, prepared, tokens, columns, *rest):
        return project_expanded_heads(x_words, prepared, tokens, columns, recovery, tiling, layout, *rest, **options)

    def gemm(x_words, w_words, tokens, columns, *rest):
        recovery = Recovery("int8", A_FORMAT, w4.format, k, with_zero=True)
        tiling = plan_heads(1, model.tokens, layout.columns, k, layout.size, A_FORMAT, w4.format).tiling
        return project_heads(x_words, w_words, tokens, columns, recovery, tiling, layout, *rest, **options)

    tilings = [with_room_for_heads(problem_of(each, prepared, n=layout.columns), layout) for each in EXPANDED_TILINGS]
    args = (x_words, prepared, tokens, columns)
    w_words = jax.jit(lambda planes: expand(planes, w4.format, interpret=interpret_params()))(w4.planes)
    named = {f"{tiling.tile_m} {tiling.schedule}, {tiling.slots} slots": tiling for tiling in tilings}
    return {
        "rotated by XLA": (by_xla, (*args, tables)),
        "gemm": (gemm, (x_words, w_words, tokens, operands.column_terms(w4.format), *rest)),
        **{f"heads, {name}": (functools.partial(heads, tiling), (*args, *rest)) for name, tiling in named.items()},
        **{
            f"matrix, {name}": (functools.partial(product, tiling, jnp.dtype(jnp.bfloat16)), args)
            for name, tiling in named.items()
        },
    }


def _packed(operands: Operands, weights: Weights) -> BipolarArray:
    """Random weights of the precision, with small scales."""
    w, terms = operands.weights(weights.format), weights.terms(operands.shape)
    if not terms:
        return w
    groups = IntegerGroups(*terms.values())
    sums = jnp.sum(groups.values(w.codes(), weights.group_size), axis=1, keepdims=True, dtype=jnp.int32)
    scale = jnp.full(sums.shape, 2.0**-10)
    return dataclasses.replace(w, scale=scale, row_sums=sums, group_size=weights.group_size, groups=groups)


def check(found: Any, expected: Any) -> None:
    """Raises ValueError unless queries, keys and values are those of XLA, and both caches keep theirs."""
    q, k, v, keys, values = (np.asarray(array, np.float32) for array in found)
    cached = [cache[0].swapaxes(1, 2) for cache in (keys, values)]
    for name, got, index in zip(("q", "k", "v", "keys", "values"), (q, k, v, *cached), (0, 1, 2, 1, 2), strict=True):
        wanted = np.asarray(expected[index], np.float32)
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        if not error <= _TOLERANCE:
            raise ValueError(f"{name} differ by {error:.2g} of the largest")


def kernel_microseconds(function: Any, args: tuple[Any, ...], iterations: int) -> float:
    """Mean time of the Mosaic kernels of a run; off a GPU 0, after one run."""
    if jax.devices()[0].platform != "gpu":
        jax.block_until_ready(function(*args))
        return 0.0

    def run() -> None:
        for _ in range(iterations):
            jax.block_until_ready(function(*args))

    run()  # an idle GPU runs at low clocks
    kernels = profile_kernels(run, iterations, most=10)["kernels"]
    return sum(kernel["microseconds"] for kernel in kernels if "mosaic" in kernel["name"])


def measure_model(model: Model, precisions: list[str], iterations: int, threads: int) -> dict[str, Any]:
    """Microseconds by precision and name; an error's text where one failed."""
    figures: dict[str, Any] = {}
    for text in precisions:
        todo = calls(model, Weights.parse(text))
        compiled = compile_all(todo, threads)
        expected = raise_if_error(compiled.pop("rotated by XLA"))(*todo["rotated by XLA"][1])
        row = figures[text] = {}
        for name, function in compiled.items():
            try:
                args = todo[name][1]
                if name.startswith("heads"):
                    check(raise_if_error(function)(*args), expected)
                row[name] = kernel_microseconds(raise_if_error(function), args, iterations)
            except Exception as error:
                row[name] = one_line(error)
            console.print(f"  W{text}A8 {name}: {row[name]}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas")
    parser.add_argument("--precisions", default="4g128,4", help="bits of weights, and groups as in 4g128")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    check_runnable()
    result = {"device": jax.devices()[0].device_kind, "models": {}}
    for name in options.models.split(","):
        console.print(f"{name}, {MODELS[name].shape}")
        precisions = options.precisions.split(",")
        result["models"][name] = measure_model(MODELS[name], precisions, options.iterations, options.threads)
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

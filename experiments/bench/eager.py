"""Counts compilations of calls outside of `jax.jit`, times them, and measures the memory that they leave behind.

    python -m experiments.bench.eager --config=configs/bench/eager.py --workdir=DIR

The first calls, which compile, are not counted. The jitted time is that of the same call within `jax.jit`, with arrays
and models as arguments. Memory is the growth of the process's largest resident size. Writes result.json to --workdir.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
from flax import linen, nnx
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer
from experiments.support import app
from experiments.support.progress import console, progress_bar
from experiments.support.workdir import RESULT_NAME, environment, write_json

# Calls that may compile: the first two of a piece.
_WARM_UP = 2
_COUNTED = 50


class Piece(NamedTuple):
    """A call and its arguments, arrays or pytrees of them."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    compilations: list[float] = []

    def count(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            compilations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    rows = {}
    for name in app.parse_names("pieces", config.pieces or ",".join(PIECES), PIECES):
        with progress_bar(name):
            rows[name] = _measure(PIECES[name](config), config, compilations)
    result = {"settings": config.to_dict(), "environment": environment(), "pieces": rows}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RESULT_NAME, result)
    _print_table(result)


def _matmul(config: ConfigDict) -> Piece:
    precision, x, kernel = _operands(config)
    packed = bj.quantize(kernel, precision.w_bits, 0, precision.group_size, scales=precision.scales)
    return Piece(lambda x, w: bj.matmul(x, w, precision.a_format), (x, packed))


def _gradient_of_matmul(config: ConfigDict) -> Piece:
    product, arguments = _matmul(config)
    return Piece(jax.grad(lambda x, w: product(x, w).sum()), arguments)


def _packed_layer(config: ConfigDict) -> Piece:
    precision, x, _ = _operands(config)
    layer = bj.nn.Linear(config.size, config.size, precision=precision, rngs=nnx.Rngs(0))
    return Piece(lambda layer, x: layer(x), (layer, x))


def _dot_general(config: ConfigDict) -> Piece:
    precision, x, kernel = _operands(config)
    dot_general = bj.DotGeneral.of(precision)
    return Piece(lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ()))), (x, kernel))


def _gradient_of_dot_general(config: ConfigDict) -> Piece:
    product, arguments = _dot_general(config)
    return Piece(jax.grad(lambda x, w: product(x, w).sum(), 1), arguments)


def _gradient_of_a_layer(config: ConfigDict) -> Piece:
    precision, x, _ = _operands(config)
    layer = nnx.Linear(config.size, config.size, dot_general=bj.DotGeneral.of(precision), rngs=nnx.Rngs(0))
    return Piece(nnx.grad(lambda layer, x: layer(x).sum()), (layer, x))


def _gradient_of_a_float_layer(config: ConfigDict) -> Piece:
    layer = nnx.Linear(config.size, config.size, rngs=nnx.Rngs(0))
    return Piece(nnx.grad(lambda layer, x: layer(x).sum()), (layer, _operands(config)[1]))


def _linen_layer(config: ConfigDict) -> Piece:
    precision, x, kernel = _operands(config)
    layer = linen.Dense(config.size, use_bias=False, dot_general=bj.DotGeneral.of(precision))
    return Piece(layer.apply, ({"params": {"kernel": kernel}}, x))


def _packed_linen_layer(config: ConfigDict) -> Piece:
    precision, x, kernel = _operands(config)
    layer = linen.Dense(config.size, use_bias=False)
    packed, variables = bj.quantize_model(layer, [(".*", precision)], {"params": {"kernel": kernel}}, x)
    return Piece(packed.apply, (variables, x))


def _model(config: ConfigDict) -> Piece:
    model = bj.quantize_model(_transformer(config.size), [(".*", bj.Precision.parse(config.precision))])
    return Piece(lambda model, ids: model(ids), (model, jnp.zeros((1, config.rows), jnp.int32)))


PIECES = {
    "matmul": _matmul,
    "packed layer": _packed_layer,
    "DotGeneral": _dot_general,
    "gradient of matmul": _gradient_of_matmul,
    "gradient of DotGeneral": _gradient_of_dot_general,
    "gradient of a layer": _gradient_of_a_layer,
    "gradient of a float layer": _gradient_of_a_float_layer,
    "linen layer": _linen_layer,
    "packed linen layer": _packed_linen_layer,
    "model(ids)": _model,
}


def _operands(config: ConfigDict) -> tuple[bj.Precision, jax.Array, jax.Array]:
    """The precision, activations, and float weights."""
    x_key, w_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (config.rows, config.size))
    return bj.Precision.parse(config.precision), x, jax.random.normal(w_key, (config.size, config.size))


def _transformer(size: int) -> Transformer:
    config = TransformerConfig(
        vocab_size=size,
        hidden_size=size,
        num_layers=2,
        num_heads=size // 64,
        num_kv_heads=size // 64,
        head_dim=64,
        ffn_size=2 * size,
        context_length=64,
    )
    return Transformer(config, rngs=nnx.Rngs(0))


def _measure(piece: Piece, config: ConfigDict, compilations: list[float]) -> dict[str, Any]:
    for _ in range(_WARM_UP):
        jax.block_until_ready(piece.call(*piece.arguments))
    before = len(compilations)
    for _ in range(_COUNTED):
        jax.block_until_ready(piece.call(*piece.arguments))
    compiled = len(compilations) - before
    jitted = jax.jit(piece.call)
    jax.block_until_ready(jitted(*piece.arguments))
    eager, jit = [], []
    for _ in range(config.timed_calls):  # in turn, so that other load on the machine meets both
        eager.append(_milliseconds(piece.call, piece.arguments))
        jit.append(_milliseconds(jitted, piece.arguments))
    peak = _peak_mb()
    for _ in range(config.memory_calls):
        jax.block_until_ready(piece.call(*piece.arguments))
    return {
        "compilations": compiled,
        "ms": round(statistics.median(eager), 3),
        "jitted_ms": round(statistics.median(jit), 3),
        "grown_mb": round(_peak_mb() - peak, 1),
    }


def _milliseconds(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return 1e3 * (time.perf_counter() - started)


def _peak_mb() -> float:
    """Largest resident size of the process so far; Linux counts it in KB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _print_table(result: dict[str, Any]) -> None:
    settings = result["settings"]
    table = Table(title=f"calls outside of jit, {settings['rows']} x {settings['size']} x {settings['size']}")
    grown = f"MB over {settings['memory_calls']:,} calls"
    for heading in ("piece", f"compilations in {_COUNTED} calls", "ms a call", "jitted ms", grown):
        table.add_column(heading, justify="left" if heading == "piece" else "right")
    for name, row in result["pieces"].items():
        figures = (f"{row['ms']:.2f}", f"{row['jitted_ms']:.2f}", f"{row['grown_mb']:.1f}")
        table.add_row(name, str(row["compilations"]), *figures)
    console.print(table)


if __name__ == "__main__":
    app.run(main)

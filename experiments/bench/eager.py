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
    for name, piece in pieces(config).items():
        with progress_bar(name):
            rows[name] = _measure(piece, config, compilations)
    result = {"settings": config.to_dict(), "environment": environment(), "pieces": rows}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RESULT_NAME, result)
    _print_table(result)


def pieces(config: ConfigDict) -> dict[str, Piece]:
    """What is called, by name."""
    precision, size = bj.Precision.parse(config.precision), config.size
    dot_general = bj.DotGeneral.of(precision)
    x_key, w_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (config.rows, size))
    kernel = jax.random.normal(w_key, (size, size))
    packed = bj.quantize(kernel, precision.w_bits, 0, precision.group_size)
    layer = bj.nn.Linear(size, size, precision=precision, rngs=nnx.Rngs(0))
    trained = nnx.Linear(size, size, dot_general=dot_general, rngs=nnx.Rngs(0))
    dense = linen.Dense(size, dot_general=dot_general)
    variables = dense.init(jax.random.key(0), x)
    packed_dense, packed_variables = bj.quantize_model(linen.Dense(size), [(".*", precision)], variables, x)
    model = bj.quantize_model(_transformer(size), [(".*", precision)])
    ids = jnp.zeros((1, config.rows), jnp.int32)
    dimensions = (((1,), (0,)), ((), ()))
    return {
        "matmul": Piece(lambda x, w: bj.matmul(x, w, precision.a_bits), (x, packed)),
        "packed layer": Piece(lambda layer, x: layer(x), (layer, x)),
        "DotGeneral": Piece(lambda x, w: dot_general(x, w, dimensions), (x, kernel)),
        "gradient of matmul": Piece(jax.grad(lambda x, w: bj.matmul(x, w, precision.a_bits).sum()), (x, packed)),
        "gradient of a layer": Piece(nnx.grad(lambda layer, x: layer(x).sum()), (trained, x)),
        "linen layer": Piece(dense.apply, (variables, x)),
        "packed linen layer": Piece(packed_dense.apply, (packed_variables, x)),
        "model(ids)": Piece(lambda model, ids: model(ids), (model, ids)),
    }


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

"""Times calibration part by part: a whole block, second moments of its inputs, the stages of rounding, writing text.

    python -m experiments.bench.calibration --config=configs/bench/calibration.py --workdir=DIR \\
        --config.model=smollm2-135m --config.precision=W4A8g64

Weights and tokens are random. Every part runs once, which compiles it, and is then timed; the stages of rounding are
cumulative ("gptq" has the search for the grid, "descent" has both). Writes result.json to --workdir.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.compress.packed_sites import float_matrix
from bipolar_jax.compress.rounding import round_rows
from bipolar_jax.compress.rounding.gptq import feedback, with_damping
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_float
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import layer_at
from experiments.support import app
from experiments.support.precision_sweep import LAYERS, peak_bytes
from experiments.support.progress import console
from experiments.support.timing import Compilations
from experiments.support.workdir import RESULT_NAME, environment, write_json

# Stages of rounding, each with those before it.
_STAGES = {
    "grid": bj.compress.Rounding("nearest"),
    "gptq": bj.compress.Rounding(descent_passes=0),
    "descent": bj.compress.Rounding(),
}


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    parts = app.parse_names("parts", config.parts, PARTS)
    compilations = Compilations.listen()
    result: dict[str, Any] = {"settings": config.to_dict(), "environment": environment(), "parts": {}}
    workdir.mkdir(parents=True, exist_ok=True)

    def add(name: str, row: dict[str, Any]) -> None:
        result["parts"][name] = row | {"peak_gb": round(peak_bytes() / 1e9, 2)}
        write_json(workdir / RESULT_NAME, result)
        console.print(f"{name}: {result['parts'][name]}")

    shape = dataclasses.replace(preset(config.model), num_layers=config.blocks)
    started = time.perf_counter()
    model = random_float(shape, jnp.dtype(config.dtype), jax.random.key(config.seed))
    model = jax.block_until_ready(bj.compress.rotate(model, config.rotation, key=jax.random.key(config.seed)))
    add("make and rotate the model", {"first": round(time.perf_counter() - started, 2), **compilations.since(0)})
    tokens = np.random.default_rng(config.seed).integers(0, shape.vocab_size, (config.windows, config.length))
    for part in parts:
        for name, row in PARTS[part](model, tokens.astype(np.int32), config, compilations):
            add(name, row)
    _print_table(result)


Rows = Iterator[tuple[str, dict[str, Any]]]


def _calibrate(model: Transformer, tokens: np.ndarray, config: ConfigDict, compilations: Compilations) -> Rows:
    """Seconds of every block, from one to the next; the last is not run again."""
    start, ends = len(compilations.seconds), [time.perf_counter()]
    counts = [start]

    def on_block(_: int) -> None:
        ends.append(time.perf_counter())
        counts.append(len(compilations.seconds))

    bj.compress.calibrate(
        model, tokens, [(LAYERS, config.precision)], windows_per_step=config.windows_per_step, on_block=on_block
    )
    seconds = np.diff(ends)
    compiled = compilations.since(start) | {"compilations_by_block": np.diff(counts).tolist()}
    middle = seconds[1:-1] if len(seconds) > 2 else seconds[1:]
    steady = round(float(np.mean(middle)), 3) if len(middle) else None
    yield "a block", {"first": round(float(seconds[0]), 2), "seconds": steady, **compiled}


def _moments(model: Transformer, tokens: np.ndarray, config: ConfigDict, compilations: Compilations) -> Rows:
    """Second moments of one batch, for each input of a block, all of whose layers are float; and the block itself."""
    block = model.block(0)
    carry = jax.jit(lambda model, ids: model.enter_blocks(ids))(model, jnp.asarray(tokens[: config.windows_per_step]))
    a_format = bj.Precision.parse(config.precision).a_format
    for index, sites in enumerate(model.block_sites):

        def sums(model, block, carry, moments, index=index, sites=sites):
            x, stream = site_inputs(model, block, carry, model.block_sites[index:])
            return moments.add(x, a_format, stream if sites.to_stream else None)

        zeros = SecondMoments.zeros(layer_at(block, sites.names[0]).in_features)
        row = _timed(jax.jit(sums), (model, block, carry, zeros), config, compilations)
        yield f"moments of one step, {sites.names[0]}", row
    run = jax.jit(lambda model, block, carry: model.run_block(block, carry))
    yield "one step of a block, float", _timed(run, (model, block, carry), config, compilations)


def _rounding(model: Transformer, tokens: np.ndarray, config: ConfigDict, compilations: Compilations) -> Rows:
    """The stages of rounding the layers of one input, for each of a block, with a random Hessian."""
    block = model.block(0)
    for sites in model.block_sites:
        rows = jnp.concatenate([float_matrix(layer_at(block, name)).astype(jnp.float32).T for name in sites.names])
        n, k = rows.shape
        hessian = jax.jit(_random_hessian, static_argnums=0)(k)
        name = f"{n} x {k}"
        yield f"factors, {name}", _timed(_factors, (hessian,), config, compilations)
        for stage, method in _STAGES.items():

            def rounded(rows, hessian, method=method):
                return round_rows(rows, hessian, config.precision, method)

            yield f"{stage}, {name}", _timed(rounded, (rows, hessian), config, compilations)


def _write(model: Transformer, tokens: np.ndarray, config: ConfigDict, compilations: Compilations) -> Rows:
    """Windows of text, all at once, of 65 tokens: 4 calls of a compiled loop."""

    def write():
        key = jax.random.key(config.seed)
        return bj.models.write_windows(model, config.windows, 65, key=key, windows_per_step=config.windows)

    yield f"write {config.windows} windows of 65 tokens", _timed(write, (), config, compilations)


PARTS = {"calibrate": _calibrate, "moments": _moments, "rounding": _rounding, "write": _write}


def _random_hessian(k: int) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (2 * k, k)) * jnp.linspace(0.1, 3, k)[None]
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) / (2 * k)


@jax.jit
def _factors(hessian: jax.Array) -> jax.Array:
    """What GPTQ factorizes: the damping, which tries a factorization, and the factor."""
    return feedback(with_damping(hessian, 0.01))


def _timed(
    call: Callable[..., Any], arguments: tuple[Any, ...], config: ConfigDict, compilations: Compilations
) -> dict[str, Any]:
    """Seconds of the first call and the median of the next ones; what compiled."""
    start = len(compilations.seconds)
    first = _seconds(call, arguments)
    compiled = compilations.since(start)
    later = [_seconds(call, arguments) for _ in range(config.iterations)]
    return {"first": round(first, 3), "seconds": round(statistics.median(later), 4), **compiled}


def _seconds(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(nnx.state(out) if isinstance(out := call(*arguments), nnx.Module) else out)
    return time.perf_counter() - started


def _print_table(result: dict[str, Any]) -> None:
    settings = result["settings"]
    windows = f"{settings['windows']} windows of {settings['length']}, {settings['windows_per_step']} a step"
    table = Table(title=f"{settings['model']}, {settings['precision']}, {windows}; {result['environment']['device']}")
    for heading in ("part", "seconds", "first call", "compilations", "of seconds", "peak GB"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, row in result["parts"].items():
        figures = (row.get("seconds"), row["first"], row["compilations"], row["compile_seconds"], row["peak_gb"])
        table.add_row(name, *("-" if figure is None else str(figure) for figure in figures))
    console.print(table)


if __name__ == "__main__":
    pin_float_products()
    app.run(main)

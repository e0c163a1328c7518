"""Times the forward pass and the training step of one feed-forward block at many precisions against bf16.

    python -m experiments.bench.training_step --config=configs/bench/training_step.py --workdir=DIR \\
        --config.tokens=8192 --config.precisions=W8A8,W4A4

The block is a Llama's (norm, gate, up, down) with float32 parameters, computed in bf16. Low precisions multiply through
`DotGeneral`, which quantizes and packs the weights in every call. The baseline is the same block with `nnx.Linear`,
jitted and timed in the same run. A step is forward pass, backward pass and AdamW's update. Before timing, the block
packed by `quantize_model` must give the same output as the block in training, bit for bit, and its integer products
must be exact. Writes result.json and speedup.png to --workdir. A stopped run resumes and retries failed precisions.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.models.blocks.feed_forward import GatedMLP
from bipolar_jax.models.blocks.norm import make_norm, normalize
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.ops.dispatch import BACKENDS, check_implementation
from bipolar_jax.packing.words import unpack_codes
from experiments.bench.products.operands import check_integers
from experiments.support import app
from experiments.support.device_lock import device_alone, device_lock, device_shared
from experiments.support.kernel_times import profile_kernels
from experiments.support.plotting import bars, legend, save
from experiments.support.progress import console
from experiments.support.timing import Timing, measure, one_line
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

# Settings that the figures depend on; all results in a workdir share them.
_SETTINGS = ("hidden_size", "ffn_size", "tokens", "calibration", "implementation", "iterations", "seed")
_TIMED = ("forward", "step")
_BASELINE = "bf16"
_CHECKED = 64  # sampled rows and columns of each product that are compared with the exact one


class Block(nnx.Module):
    """A Llama's feed-forward block, in bf16."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.norm = make_norm(config.norm, config, param_dtype=jnp.bfloat16, rngs=rngs)
        self.ffn = GatedMLP(config, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
        return x + self.ffn(x, self.norm)


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    with device_lock():
        _measure(config, workdir)


def make_block(config: ConfigDict, precision: bj.Precision | None) -> Block:
    """The block with random weights, for training at `precision`, or in bf16 if that is None."""
    shapes = TransformerConfig(
        vocab_size=1,
        hidden_size=config.hidden_size,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        ffn_size=config.ffn_size,
        context_length=1,
    )
    block = Block(shapes, nnx.Rngs(config.seed))
    if precision is None:
        return block
    return bj.quantization_aware(block, [(".*", precision)], implementation=config.implementation)


def _measure(config: ConfigDict, workdir: Path) -> None:
    check_implementation(config.implementation)
    precisions = {name: bj.Precision.parse(name, config.calibration) for name in config.precisions.split(",")}
    if missing := [name for name, precision in precisions.items() if precision.a_bits is None]:
        raise ValueError(f"{missing[0]} has float activations: only integer products are measured here")
    settings = {name: config[name] for name in _SETTINGS} | {"device": jax.devices()[0].device_kind}
    settings["sources_sha256"] = kernels_fingerprint("nn", "ops", "quantize", "packing")
    result = read_result(workdir, settings, {"precisions": ()}) or {"settings": settings, "precisions": {}}
    result["environment"] = environment()
    x = jax.random.normal(jax.random.key(config.seed), (1, config.tokens, config.hidden_size), jnp.bfloat16)
    to_profile = {}
    for name, precision in {_BASELINE: None, **precisions}.items():
        if "step" in result["precisions"].get(name, {}):
            continue
        try:
            measured, to_profile[name] = _measure_one(config, precision, x)
        except Exception as error:
            measured = {"error": one_line(error)}
        result["precisions"][name] = measured
        console.print(f"{name}: {line(measured)}")
        save_result(workdir, result, add_speedups, precisions=[_BASELINE, *precisions])
    # Last: after JAX's profiler has run, `measure`, which uses the same GPU interface (CUPTI), gets no times.
    for name, runs in to_profile.items() if config.profile_most else ():
        for label, run in runs.items():
            result["precisions"][name][label]["kernels"] = profile_kernels(run, 1, config.profile_most)["kernels"]
        save_result(workdir, result, add_speedups, precisions=[_BASELINE, *precisions])
    _plot(result, workdir / "speedup.png")
    print_table(result)
    console.print(f"results and plot: {workdir}")


def _measure_one(
    config: ConfigDict, precision: bj.Precision | None, x: Array
) -> tuple[dict[str, Any], dict[str, Callable[[], None]]]:
    """Figures of one precision, and the timed functions by name, for the profiler."""
    block = make_block(config, precision)
    measured = {} if precision is None else check_block(block, x, config)
    graph, state = nnx.split(block)
    params = jax.tree.map(lambda value: value.astype(jnp.float32), state)
    optimizer = optax.adamw(1e-3)

    def forward(params, x):
        return nnx.merge(graph, jax.tree.map(lambda value: value.astype(jnp.bfloat16), params))(x)

    def step(params, moments, x):
        def loss(params):
            return jnp.mean(jnp.square(forward(params, x).astype(jnp.float32)))

        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer
            updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    calls = {"forward": (forward, (params, x)), "step": (step, (params, optimizer.init(params), x))}
    runs = {}
    for label, (function, args) in calls.items():
        with device_alone() if precision is None else device_shared():  # XLA chooses bf16 products by their times
            compiled = jax.jit(function).lower(*args).compile()
        timing = measure(compiled, *args, iterations=config.iterations)
        measured[label] = timing.to_json() | {"wall": queued(compiled, args, config.iterations).to_json()}
        runs[label] = functools.partial(_run, compiled, args)
    return measured, runs


def check_block(block: Block, x: Float[Array, "1 tokens hidden"], config: ConfigDict) -> dict[str, int]:
    """Compares a block in training with the packed one that `quantize_model` makes of it.

    Returns:
      The number of compared outputs and of compared integers of products.

    Raises:
      ValueError: an output differs in any bit, or an integer is not exact.
    """
    packed = bj.quantize_model(block)
    run = nnx.jit(lambda block, x: block(x))
    trained_output, packed_output = np.asarray(run(block, x)), np.asarray(run(packed, x))
    wrong = np.count_nonzero(trained_output.view(np.uint16) != packed_output.view(np.uint16))
    if wrong or not np.isfinite(trained_output.astype(np.float32)).all():
        raise ValueError(f"{wrong} of {trained_output.size} outputs of the packed block differ from the trained one's")
    rows, compared = normalize(block.norm, x)[0], 0
    for name in ("gate_proj", "up_proj"):
        layer = getattr(packed.ffn, name)
        compared += _check_integers(rows, layer.kernel.get_value(), layer.precision.a_format, config)
    inner = jax.nn.silu(block.ffn.gate_proj(rows)) * block.ffn.up_proj(rows)
    layer = packed.ffn.down_proj
    compared += _check_integers(inner, layer.kernel.get_value(), layer.precision.a_format, config)
    return {"outputs_compared": trained_output.size, "integers_compared": compared}


def _check_integers(rows: Array, w: bj.BipolarArray, a_format: bj.BipolarFormat, config: ConfigDict) -> int:
    """Compares a sample of the integer product of quantized rows and packed weights with the exact one."""
    chosen = bj.explain(rows, w, a_format, implementation=config.implementation).implementation
    codes = jax.jit(quantize_tokens, static_argnums=1)(rows, a_format).codes
    found = jax.jit(BACKENDS[chosen].integer_matmul, static_argnums=2)(codes, w, a_format)[:, :, 0]
    rng = np.random.default_rng(config.seed)
    samples = [np.sort(rng.choice(size, min(_CHECKED, size), replace=False)) for size in found.shape]
    x_codes = np.asarray(codes)[samples[0]].astype(np.float64)
    w_codes = np.asarray(unpack_codes(w.planes, w.format, w.contracted_size))[samples[1]].astype(np.float64)
    expected = (2 * x_codes - a_format.max_value) @ (2 * w_codes - w.format.max_value).T  # float64 holds the sums
    check_integers(np.asarray(found)[np.ix_(*samples)], expected.astype(np.int64))
    return expected.size


def queued(function: Callable[..., Any], args: tuple[Any, ...], iterations: int) -> Timing:
    """Wall time per call of calls that are queued on the device without waiting for each other, as in training."""
    jax.block_until_ready(function(*args))
    calls, microseconds = 5, []
    for _ in range(iterations):
        started = time.perf_counter()
        results = [function(*args) for _ in range(calls)]
        jax.block_until_ready(results)
        microseconds.append(1e6 * (time.perf_counter() - started) / calls)
        del results
    return Timing.of(microseconds, "wall")


def add_speedups(result: dict[str, Any]) -> None:
    """Sets "speedup" of every figure: bf16's time divided by its own, on the same clock."""
    baseline = result["precisions"].get(_BASELINE, {})
    for measured in result["precisions"].values():
        for label in _TIMED:
            if label in measured and label in baseline:
                for mine, other in (
                    (measured[label], baseline[label]),
                    (measured[label]["wall"], baseline[label]["wall"]),
                ):
                    mine["speedup"] = round(other["microseconds"] / mine["microseconds"], 3)


def line(measured: dict[str, Any]) -> str:
    """The figures of one precision in one line."""
    if "error" in measured:
        return measured["error"]
    return ", ".join(f"{label} {measured[label]['microseconds'] / 1e3:.3f} ms" for label in _TIMED)


def print_table(result: dict[str, Any]) -> None:
    """Prints milliseconds by precision, as device time and as wall time."""
    settings = result["settings"]
    sizes = f"{settings['tokens']} tokens, {settings['hidden_size']} x {settings['ffn_size']}"
    title = (
        f"feed-forward block, {sizes}, calibration {settings['calibration']}, on {settings['device']}: medians in ms"
    )
    table = Table(title=title)
    for heading in ("precision", "forward", "x bf16", "step", "x bf16", "forward, wall", "x", "step, wall", "x"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for name, measured in result["precisions"].items():
        if "error" in measured:
            table.add_row(name, measured["error"][:60])
            continue
        timings = [measured[label] for label in _TIMED] + [measured[label]["wall"] for label in _TIMED]
        cells = [(f"{some['microseconds'] / 1e3:.3f}", f"{some.get('speedup', np.nan):.2f}") for some in timings]
        table.add_row(name, *(text for cell in cells for text in cell))
    console.print(table)


def _plot(result: dict[str, Any], path: Path) -> None:
    names = [name for name, measured in result["precisions"].items() if "step" in measured]
    series = {label: {name: result["precisions"][name][label].get("speedup") for name in names} for label in _TIMED}
    figure = matplotlib.figure.Figure(figsize=(0.9 * len(names) + 4, 4), layout="constrained")
    axes = figure.subplots()
    bars(axes, names, series)
    settings = result["settings"]
    axes.set(
        ylabel="times as fast as bf16",
        title=f"training {settings['hidden_size']} x {settings['ffn_size']}, {settings['tokens']} tokens, "
        f"on {settings['device']}",
    )
    legend(figure)
    save(figure, path)


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    jax.block_until_ready(function(*args))


if __name__ == "__main__":
    app.run(main)

"""Where the time of a decode step goes: the steps of each phase of a layer, by the clocks of all blocks.

    python -m experiments.bench.language_models.decode_timeline --config=configs/bench/decode_timeline.py --workdir=DIR

Runs all layers of a model with random weights as one kernel (`kernels/sm90/decode_step`) whose warpgroups store their
clocks, and prints a table for each precision, in microseconds of a layer: medians over layers, of the first warpgroup
unless a column says otherwise. `DIR/result.json` has the tables; with --config.save_clocks the readings too. The kernel
without readings is timed beside it, so that one sees what they cost. Needs a Hopper GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.decode_step.api import decode_layers, plan_decode_layers
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import assign_head
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.timeline import ENTER, LEAVE, MARKS, WAITED, split_timeline
from bipolar_jax.kernels.sm90.decode_step.phases import PHASES
from bipolar_jax.models.blocks.fused_decode import layer_norms
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.ops import Activation
from experiments.support import app
from experiments.support.device_lock import device_alone, device_lock
from experiments.support.progress import console
from experiments.support.workdir import RESULT_NAME, environment, write_json

# Columns of a table, and what is between which marks; "begin" is the end of the phase before, in the same block.
STEPS = {
    "prepare": ("begin", "prepared"),
    "own block": ("prepared", "released"),
    "others": ("released", "arrived"),
    "token": ("arrived", "encoded"),
    "multiply": ("encoded", "multiplied"),
    "meet": ("multiplied", "met"),
    "finish": ("met", "stored"),
}
# Options of `decode_layers` that are compared.
VARIANTS = {"shared chunks": {}, "own chunks": {"shares_chunks": False}}
_SKIPPED = 2  # layers at either end, whose ring is being filled or has nothing more to load


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    precisions = [bj.Precision.parse(name) for name in app.split_names(config.precisions)]
    workdir.mkdir(parents=True, exist_ok=True)
    tables = {}
    with device_lock(shared=True):
        for precision in precisions:
            model = random_packed(preset(config.model), precision, key=jax.random.key(config.seed), embed_bits=None)
            prepared = prepare_for_inference(model, layout=config.layout or None)
            operands, static = operands_of(prepared, config.length, config.seed, config.texts)
            del model, prepared
            shape = plan_decode_layers(**operands, **static).tiling
            for variant in app.parse_names("variants", config.variants, VARIANTS):
                name = f"{precision} {variant}"
                with device_alone():
                    milliseconds, timeline = run(operands, static | VARIANTS[variant], config.iterations)
                clocks, ends = split_timeline(timeline, shape.num_layers, len(PHASES))
                active = active_blocks(dataclasses.replace(shape, **VARIANTS[variant]))
                tables[name] = milliseconds | summary(clocks, ends, active)
                show(name, tables[name])
                if config.save_clocks:
                    np.savez_compressed(workdir / f"{name}.npz", clocks=clocks, ends=ends)
            del operands
    write_json(workdir / RESULT_NAME, {"settings": config.to_dict(), "environment": environment(), "timelines": tables})


def operands_of(model: Transformer, length: int, seed: int, texts: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and static arguments of `decode_layers` for a token of each text after `length` random ones."""
    config, layers = model.config, model.layers
    if config.ffn != "swiglu" or config.positions != "rope":
        raise ValueError(f"the timeline is of models with SwiGLU and rotary positions, not {config.ffn}")
    products = {
        "qkv": layers.attention.qkv_proj,
        "o": layers.attention.o_proj,
        "up": layers.ffn.gate_up_proj,
        "down": layers.ffn.down_proj,
    }
    keys = jax.random.split(jax.random.key(seed), 3)
    cache = (config.num_layers, texts, config.num_kv_heads, -(-(length + 1) // 64) * 64, config.head_dim)
    angle = length * 10000.0 ** (-np.arange(config.head_dim // 2) / (config.head_dim // 2))
    arrays = {
        "hidden": jax.random.normal(keys[0], (texts, config.hidden_size)),
        "kernels": {name: layer.kernel.get_value() for name, layer in products.items()},
        "biases": {name: None if layer.bias is None else layer.bias[...] for name, layer in products.items()},
        "norms": layer_norms(layers),
        "keys": (jax.random.normal(keys[1], cache, jnp.bfloat16),),
        "values": (jax.random.normal(keys[2], cache, jnp.bfloat16),),
        "lengths": jnp.full(texts, length, jnp.int32),
        "tables": tuple(jnp.tile(jnp.asarray(f(angle), jnp.float32), (texts, 1)) for f in (np.cos, np.sin)),
        "slopes": None,
    }
    return arrays, {
        "activation": Activation("silu", gated=True),
        "a_format": products["qkv"].precision.a_format,
    }


def run(arrays: dict[str, Any], static: dict[str, Any], iterations: int) -> tuple[dict[str, float], np.ndarray]:
    """Milliseconds of the layers without and with readings of the clock, and the last readings."""
    milliseconds = {}
    for name, timed in (("milliseconds", False), ("milliseconds_timed", True)):
        layers = jax.jit(functools.partial(decode_layers, **static, timed=timed))
        found = jax.block_until_ready(layers(**arrays))
        started = time.perf_counter()
        for _ in range(iterations):
            found = layers(**arrays)
        jax.block_until_ready(found)
        milliseconds[name] = 1e3 * (time.perf_counter() - started) / iterations
    return milliseconds, np.asarray(found[2])


def active_blocks(shape: LayersShape) -> dict[str, np.ndarray]:
    """The indices of the blocks that have something to do in each phase."""
    blocks = np.arange(shape.blocks)
    heads = jax.vmap(functools.partial(assign_head, shape))(jnp.arange(shape.blocks, dtype=jnp.int32))
    active = {"attention": heads.active, "combine": heads.combines}
    active |= {name: blocks * product.rows < product.counted_rows for name, product in shape.products.items()}
    return {name: np.flatnonzero(mask) for name, mask in active.items()}


def summary(clocks: np.ndarray, ends: np.ndarray, active: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures of a timeline.

    Args:
      clocks, ends: as `split_timeline` returns them.
      active: of `active_blocks`.

    Returns:
      "clock_ghz", "timer_ns" (the resolution of the device's time, which orders the clocks of blocks), "step_us" and
      "phases": for each phase, in microseconds, `STEPS`, medians over the active blocks, and

      - "phase": from the last block's result of the phase before to that of this one, so that phases add up to a layer;
      - "hop": of "others", from the last block's result to the median block's arrival;
      - "waiting": of "multiply", for weights or cache that had not arrived, mean of the warpgroups;
      - "spread": between the median block's and the last block's result.
    """
    clocks, ends = clocks.astype(np.int64), ends.astype(np.int64)
    elapsed = (ends[:, :, LEAVE] - ends[:, :, ENTER]) % 2**32  # [blocks, warpgroups, clock and ns]
    frequency = np.median(elapsed[..., 0] / elapsed[..., 1])  # clocks a ns
    # One time for all: clocks since the block entered, and when that was.
    device_ns = (ends[..., 1] - ends[0, 0, ENTER, 1] + 2**31) % 2**32 - 2**31
    began = device_ns[:, :, ENTER]
    times = (clocks[..., :WAITED] - ends[:, :, None, None, None, ENTER, 0]) % 2**32 / frequency
    times = (times + began[:, :, None, None, None]) / 1e3  # us
    waits = clocks[..., WAITED] % 2**32 / frequency / 1e3
    layers = np.arange(_SKIPPED, times.shape[2] - _SKIPPED)
    steps, rows = {name: i for i, name in enumerate(MARKS)}, {}
    for i, name in enumerate(PHASES):
        # The phase before, of the layer before if this is the first.
        before, layers_before = (i - 1, layers) if i else (len(PHASES) - 1, layers - 1)
        stored_before = times[:, 0, layers_before, before, steps["stored"]]
        last_before = stored_before[active[PHASES[before]]].max(axis=0)
        blocks = active[name]
        marks = {step: times[blocks][:, 0, layers, i, at] for step, at in steps.items()}
        marks["begin"] = stored_before[blocks]
        last = marks["stored"].max(axis=0)
        row = {"phase": _median(last - last_before), "spread": _median(last - np.median(marks["stored"], axis=0))}
        if name == "combine":  # by the first warpgroup, in one step
            row["finish"] = _median(marks["stored"] - marks["released"])
        else:
            row |= {column: _median(marks[second] - marks[first]) for column, (first, second) in STEPS.items()}
            row["hop"] = _median(np.median(marks["arrived"], axis=0) - last_before)
            row["waiting"] = _median(waits[blocks][:, :, layers, i].mean(axis=1))
        rows[name] = row
    return {
        "clock_ghz": float(frequency),
        "timer_ns": int(np.gcd.reduce(device_ns, axis=None)),
        "step_us": float(np.median(elapsed[..., 1]) / 1e3),
        "phases": rows,
    }


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 3)


def show(name: str, timeline: dict[str, Any]) -> None:
    """Prints a table."""
    columns = ["phase", "hop", "spread", *STEPS, "waiting"]
    title = (
        f"{name}: layers {timeline['milliseconds']:.3f} ms, with readings {timeline['milliseconds_timed']:.3f} ms, "
        f"{timeline['clock_ghz']:.2f} GHz, timer of {timeline['timer_ns']} ns; us of a layer"
    )
    table = Table("", *columns, title=title)
    for phase, row in timeline["phases"].items():
        table.add_row(phase, *("" if column not in row else f"{row[column]:.2f}" for column in columns))
    total = sum(row["phase"] for row in timeline["phases"].values())
    table.add_row("layer", f"{total:.2f}")
    console.print(table)


def command() -> None:
    """The command line."""
    app.run(main, example="bench/decode_timeline")


if __name__ == "__main__":
    command()

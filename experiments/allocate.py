"""Finds how many bits each layer and site of a language model should have, under a budget.

    python -m experiments.allocate --config=configs/compression/allocate.py --workdir=DIR \\
        --config.precisions=W2A8g64,W3A8g64,W4A8g64,W5A8g64 --config.budget=4.0

The model is calibrated once at each precision. Then, for every decoder layer and every input in it (query, key and
value; output; gate and up; down), the loss of the float model is measured with only these layers packed. Costs are the
bits of weights, scales and offsets, or with --config.unit=milliseconds the measured times of the products. The
assignment that loses least within a budget, of at most --config.runs runs of equal layers, goes to
DIR/rules_BUDGET.json, for experiments/calibrate.py:

    python -m experiments.calibrate --config=configs/calibrate.py --workdir=DIR2 --config.precisions= \\
        --config.rules=DIR/rules_4.0.json

What was measured is in DIR/result.json, the least loss of every budget in DIR/pareto.png. A stopped run resumes. With
--config.mesh.data=2 two devices divide the windows that losses are measured with; one device calibrates.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.compress.allocation import Assignment, frontier, rules_of, site_bits, site_losses
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import layer_at, run_name

from .calibrate import calibration_tokens, rotation_block
from .distributed.mesh import mesh_of
from .support import app
from .support.plotting import save
from .support.precision_sweep import LAYERS, plain
from .support.progress import console, progress_bar
from .support.sources import load_model_source, model_fingerprint
from .support.timing import measure
from .support.workdir import RESULT_NAME, environment, read_result, write_json

UNITS = ("bits", "bytes", "milliseconds")
# Settings that the measured losses depend on.
_SETTINGS = (
    "model",
    "precisions",
    "calibration_text",
    "calibration_windows",
    "calibration_length",
    "sensitivity_windows",
    "rotation",
    "rotation_block",
    "rounding",
    "seed",
)
_ITERATIONS = 20


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    options = [str(bj.Precision.parse(text)) for text in app.split_names(config.precisions)]
    method = bj.compress.Rounding(**config.rounding)
    _check(config, options)
    mesh = mesh_of(config)
    _check_mesh(config, mesh)
    for option in options:
        method.check(bj.Precision.parse(option))
    settings = {name: plain(config[name]) for name in _SETTINGS}
    settings["model_fingerprint"] = model_fingerprint(config.model)
    result = read_result(workdir, settings, {"losses": tuple(options)}) or {"settings": settings, "losses": {}}
    result["environment"] = environment()
    pretrained = load_model_source(config.model)
    tokens = calibration_tokens(config, workdir, pretrained)
    with progress_bar(f"rotating: {config.rotation}"):
        key = jax.random.key(config.seed)
        block = rotation_block(config, pretrained)
        model = jax.block_until_ready(bj.compress.rotate(pretrained.model, config.rotation, key=key, block=block))
    if config.only:
        _calibrated(model, tokens, config.only, method, config, workdir)
        return
    packed = [_calibrated(model, tokens, option, method, config, workdir) for option in options]
    losses = _losses(model, packed, options, tokens[: config.sensitivity_windows], config, workdir, result, mesh)
    costs, unit_of_one = _costs(packed, options, config, result)
    found = frontier(*_by_site(losses, costs, config.alike), costs.max(-1).sum(), config.runs)
    uniform = {
        option: {"cost": costs[..., index].sum() / unit_of_one, "predicted_loss": losses[..., index].sum()}
        for index, option in enumerate(options)
    }
    result["uniform"], result["unit"], result["assignments"] = uniform, config.unit, {}
    for budget in app.split_names(str(config.budget)):
        amount = uniform[budget]["cost"] if budget in options else float(budget)
        best = found.within(amount * unit_of_one)
        best = dataclasses.replace(best, choices=np.broadcast_to(best.choices, losses.shape[:2]))
        result["assignments"][budget] = {
            "budget": amount,
            "cost": best.cost / unit_of_one,
            "predicted_loss": best.loss,
            "runs": [run_name(run) for run in best.runs],
            "choices": [[options[option] for option in layer] for layer in best.choices],
        }
        write_json(workdir / f"rules_{budget}.json", rules_of(best, model.block_sites, options))
        _print_table(model, best, result, budget, options)
    write_json(workdir / RESULT_NAME, result)
    _plot([(each.cost / unit_of_one, each.loss) for each in found.assignments], result, workdir / "pareto.png")


def _check(config: ConfigDict, options: list[str]) -> None:
    """Raises ValueError for settings that cannot be, before anything is loaded."""
    if len(options) < 2 or len(set(options)) < len(options):
        raise ValueError(f"config.precisions is {config.precisions!r}: name at least two different ones")
    if config.only and config.only not in options:
        raise ValueError(f"config.only is {config.only!r}, which is none of {', '.join(options)}")
    if config.unit not in UNITS:
        raise ValueError(f"config.unit is {config.unit!r}: choose from {', '.join(UNITS)}")
    if config.runs < 1 or not 1 <= config.sensitivity_windows <= config.calibration_windows:
        raise ValueError("config.runs must be at least 1, and config.sensitivity_windows within calibration_windows")
    for budget in app.split_names(str(config.budget)) or [""]:
        if budget not in options and not re.fullmatch(r"\d+(\.\d*)?|\.\d+", budget):
            raise ValueError(
                f"config.budget is {config.budget!r}: give numbers of {config.unit}, or some of the precisions, whose "
                "costs are the budgets"
            )


def _check_mesh(config: ConfigDict, mesh: Mesh | None) -> None:
    """Raises ValueError for what several devices do not measure."""
    if mesh is None:
        return
    asked = f"config.mesh.data={config.mesh.data} times config.mesh.model={config.mesh.model}"
    if config.unit == "milliseconds":
        raise ValueError(
            f"config.unit is 'milliseconds', which are those of one device, and {asked} is {mesh.size}: measure losses "
            "on the mesh with another unit, then run again without config.mesh, which keeps them"
        )
    windows, at_once = config.sensitivity_windows, config.windows_per_step
    if windows % mesh.size or (at_once < windows and at_once % mesh.size):
        raise ValueError(
            f"config.sensitivity_windows={windows}, config.windows_per_step={at_once} at once, do not divide over the "
            f"{mesh.size} devices of {asked}: make both multiples of {mesh.size}"
        )


def _calibrated(model, tokens, option: str, method, config: ConfigDict, workdir: Path) -> Transformer:
    """The model at one precision; finished blocks are kept in the workdir."""
    with progress_bar(f"{option}: calibrating", model.num_blocks) as advance:
        return bj.compress.calibrate(
            model,
            tokens,
            [(LAYERS, option)],
            method=method,
            windows_per_step=config.windows_per_step,
            on_block=lambda blocks: advance(blocks, "blocks"),
            store=workdir / f"{option}.blocks",
        )


def _losses(
    model,
    packed,
    options: list[str],
    tokens,
    config: ConfigDict,
    workdir: Path,
    result: dict[str, Any],
    mesh: Mesh | None,
) -> Float[np.ndarray, "blocks sites options"]:
    """The loss of each site and option, block by block; blocks of an earlier run come from the result."""
    known = {int(block): np.array(list(row.values())).T for block, row in result["losses"].items()}

    def keep(block, found):
        result["losses"][str(block)] = dict(zip(options, found.T.tolist(), strict=True))
        write_json(workdir / RESULT_NAME, result)
        advance(block + 1, "blocks")

    with progress_bar("what each site loses at each precision", model.num_blocks) as advance:
        at_once = config.windows_per_step
        return site_losses(model, packed, tokens, windows_per_step=at_once, known=known, on_block=keep, mesh=mesh)


def _costs(
    packed, options: list[str], config: ConfigDict, result: dict[str, Any]
) -> tuple[Float[np.ndarray, "blocks sites options"], float]:
    """Costs of each site and option; and how much of them is one of the budget's unit."""
    bits, weights = site_bits(packed)
    if config.unit != "milliseconds":
        return bits, float(weights if config.unit == "bits" else 8)
    timed = result.setdefault("milliseconds", {})
    device = result["environment"]["device"]
    names = [f"{option}, {config.timed_tokens} tokens, {device}" for option in options]
    for name, each in zip(names, packed, strict=True):
        timed[name] = timed.get(name) or _milliseconds(each, config.timed_tokens)
    return np.broadcast_to(np.array([timed[name] for name in names]).T, bits.shape).copy(), 1.0


def _by_site(
    losses: Float[np.ndarray, "blocks sites options"], costs: Float[np.ndarray, "blocks sites options"], alike: bool
) -> tuple[Float[np.ndarray, "blocks _ options"], Float[np.ndarray, "blocks _ options"]]:
    """Losses and costs of what has an option of its own: every site, or if they are to be alike whole layers."""
    return (losses.sum(1, keepdims=True), costs.sum(1, keepdims=True)) if alike else (losses, costs)


def _milliseconds(packed: Transformer, tokens: int) -> list[float]:
    """The time of the products of each input of a layer, as they are prepared for inference."""
    prepared = prepare_for_inference(packed)
    block, times = prepared.block(0), []
    for sites in prepared.block_sites:
        layers = [layer_at(block, name) for name in sites.names]
        x = jnp.ones((tokens, layers[0].in_features), prepared.final_norm.scale.dtype)

        @jax.jit
        def products(layers: list[nnx.Module], x: jax.Array) -> list[jax.Array]:
            return [layer(x) for layer in layers]

        times.append(measure(products, layers, x, iterations=_ITERATIONS).median / 1e3)
    return times


def _unit(result: dict[str, Any]) -> str:
    return "bits a weight" if result["unit"] == "bits" else result["unit"]


def _plot(points: list[tuple[float, float]], result: dict[str, Any], path: Path) -> None:
    """The least loss of every budget, the precisions by themselves, and what was chosen."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), label="best assignment")
    for option, row in result["uniform"].items():
        axes.plot(row["cost"], row["predicted_loss"], "o", color="tab:orange")
        axes.annotate(option, (row["cost"], row["predicted_loss"]), textcoords="offset points", xytext=(4, 4))
    for budget, row in result["assignments"].items():
        axes.plot(row["cost"], row["predicted_loss"], "*", markersize=12, label=f"budget of {budget}")
    axes.set(yscale="log", xlabel=_unit(result), ylabel="sum of the losses of single sites (nats a token)")
    axes.legend(fontsize=8)
    save(figure, path)


def _print_table(model: Transformer, best: Assignment, result: dict[str, Any], budget: str, options: list[str]) -> None:
    row = result["assignments"][budget]
    title = f"budget {budget}: {row['cost']:.4g} of {row['budget']:.4g} {_unit(result)}"
    table = Table(title=f"{title}, predicted loss {row['predicted_loss']:.4g}")
    for heading in ("layers", *(sites.names[0].rpartition("/")[2] for sites in model.block_sites)):
        table.add_column(heading)
    for run in best.runs:
        table.add_row(run_name(run), *(options[option] for option in best.choices[run.start]))
    console.print(table)
    for option, each in result["uniform"].items():
        console.print(f"{option} everywhere: {each['cost']:.4g} {_unit(result)}, {each['predicted_loss']:.4g}")


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="compression/allocate")


if __name__ == "__main__":
    command()

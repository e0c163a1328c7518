"""Reads packed checkpoints at fewer and fewer bits, and plots what one file gives at every precision.

    python -m experiments.dropped_planes --config=configs/compression/dropped_planes.py --workdir=DIR \\
        --config.models=NESTED/W8A8.safetensors,CALIBRATED/W4A8.safetensors --config.text=PATH

A checkpoint of 8 bits holds those of fewer: their bit planes. Whether these serve well depends on how the codes were
rounded (`Rounding(nested=(6, 4))`). Growth of the perplexity over the float model is paired, window by window. Writes
result.json, dropped_planes.png and a table; a figure that is there already is not measured again. With
--config.mesh.model=2 packed models are cut over two devices, which changes float sums by their rounding.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import matplotlib.figure
from flax import nnx
from ml_collections import ConfigDict
from rich.table import Table

from bipolar_jax.format import as_format
from bipolar_jax.models.inference.perplexity import Perplexity, paired_difference
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import encode
from bipolar_jax.nn.layers.linear import Linear

from .distributed.mesh import cuts_of, mesh_of, packed_on_mesh
from .support import app
from .support.plotting import save
from .support.precision_sweep import scored_windows
from .support.progress import console
from .support.sources import load_model_source, load_text_source, model_fingerprint
from .support.workdir import RESULT_NAME, environment, read_result, write_json

_SETTINGS = ("models", "against", "bits", "text", "windows", "window_length")
_FIELDS = ("perplexity", "standard_error", "window_losses")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    models = app.split_names(config.models)
    bits = [int(each) for each in app.split_names(config.bits)]
    if not models or not bits:
        raise ValueError("nothing to read: config.models and config.bits need an entry each")
    mesh = mesh_of(config)
    text = load_text_source(config.text)
    settings = {name: config[name] for name in _SETTINGS}
    settings |= {"fingerprints": [model_fingerprint(name) for name in (config.against, *models)]}
    settings |= {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    result = read_result(workdir, settings, {"rows": _FIELDS}) or {"settings": settings, "rows": {}}
    result["environment"] = environment()
    sources = [(config.against, None), *((model, each) for model in models for each in bits)]
    for model, most_bits in sources:
        name = row_name(model, most_bits)
        if name in result["rows"]:
            continue
        pretrained = load_model_source(model, most_bits)
        if most_bits is not None and largest_bits(pretrained) < most_bits:
            continue  # the file has fewer
        pretrained = packed_on_mesh(pretrained, mesh, cuts_of(config))
        result["rows"][name] = _score(name, pretrained, text, config)
        write_json(workdir / RESULT_NAME, result)
    _add_growth(result, row_name(config.against, None))
    write_json(workdir / RESULT_NAME, result)
    _plot(result, models, bits, workdir / "dropped_planes.png")
    _print_table(result)


def row_name(model: str, most_bits: int | None) -> str:
    """The name of a row of the result, such as "runs/W8A8.safetensors at 4 bits"."""
    return model if most_bits is None else f"{model} at {most_bits} bits"


def largest_bits(pretrained: PretrainedModel) -> int:
    """Most weight bits of the packed decoder layers of a model."""
    layers = [layer for _, layer in nnx.iter_modules(pretrained.model) if isinstance(layer, Linear)]
    return max((as_format(layer.precision.w_bits).bits for layer in layers), default=0)


def _score(name: str, pretrained: PretrainedModel, text: str, config: ConfigDict) -> dict[str, Any]:
    ids = encode(pretrained.tokenizer, text, add_special_tokens=False)
    scored = scored_windows(name, pretrained.model, ids, config, windows_per_step=config.windows_per_step)
    numbers = scored.perplexity, scored.standard_error
    row = {field: number if math.isfinite(number) else None for field, number in zip(_FIELDS, numbers, strict=False)}
    return row | {"window_losses": list(scored.window_losses)}


def _add_growth(result: dict[str, Any], baseline: str) -> None:
    """The paired growth of every row over the float model's, and its standard error."""
    scored = {name: _scored(row["window_losses"]) for name, row in result["rows"].items()}
    for name, row in result["rows"].items():
        difference = paired_difference(scored[name], scored[baseline])
        growth, error = difference.relative_perplexity - 1, difference.standard_error
        row["growth"] = growth if math.isfinite(growth) else None
        row["growth_standard_error"] = error if math.isfinite(error) else None


def _scored(losses: list[float]) -> Perplexity:
    return Perplexity(math.nan, math.nan, len(losses), 0, tuple(losses))


def _plot(result: dict[str, Any], models: list[str], bits: list[int], path: Path) -> None:
    """Growth against bits, a line for each checkpoint."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for model in models:
        rows = {each: result["rows"].get(row_name(model, each)) for each in sorted(bits)}
        points = [(each, row) for each, row in rows.items() if row is not None and row["growth"] is not None]
        if points:
            errors = [100 * (row["growth_standard_error"] or 0) for _, row in points]
            heights = [100 * row["growth"] for _, row in points]
            axes.errorbar([each for each, _ in points], heights, errors, marker="o", capsize=3, label=model)
    axes.set(xlabel="bits that are read", ylabel="growth of the perplexity (%)", xticks=sorted(bits))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_title(f"one file at several precisions, {result['settings']['windows']} windows")
    axes.legend(fontsize=8)
    save(figure, path)


def _print_table(result: dict[str, Any]) -> None:
    table = Table(title="checkpoints at fewer bits")
    for heading in ("checkpoint", "perplexity", "growth"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right", overflow="fold")
    for name, row in result["rows"].items():
        error = row["growth_standard_error"]
        growth = "inf" if row["growth"] is None else f"{row['growth']:+.2%}"
        value = "inf" if row["perplexity"] is None else f"{row['perplexity']:.5g}"
        table.add_row(name, value, growth + ("" if error is None else f" ± {error:.2%}"))
    console.print(table)


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="compression/dropped_planes")


if __name__ == "__main__":
    command()

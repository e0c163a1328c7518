"""Quantizes a language model to several precisions and measures the perplexity and size of each.

    python -m experiments.quantize --config=configs/smollm2.py --workdir=DIR \\
        --config.text=PATH --config.windows=20 --config.precisions=W8A8,W4A8g64

Writes to --workdir result.json, perplexity.png and, per precision, a packed checkpoint that
experiments/generate.py reads. A stopped run resumes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.models.checkpoint import save_model
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import encode

from .support import app
from .support.perplexity_plot import plot_perplexity
from .support.progress import console, progress_bar
from .support.sources import load_model_source, load_text_source, model_fingerprint
from .support.workdir import RESULT_NAME, check_rows, environment, read_result, write_json

_EMBEDDING, _LAYERS = "^(embed|lm_head)$", "^layers/"
# Settings that the perplexity depends on; all results in a workdir share them.
_SETTINGS = ("model", "text", "windows", "window_length", "embedding_precision", "calibration")

_ROW_FIELDS = ("perplexity", "standard_error", "windows", "bytes", "sample")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    precisions = [bj.Precision.parse(text, config.calibration) for text in config.precisions.split(",")]
    embedding_precision = bj.Precision.parse(config.embedding_precision, config.calibration)
    text = load_text_source(config.text)
    pretrained = load_model_source(config.model)
    ids = encode(pretrained.tokenizer, text, add_special_tokens=False)
    settings = {name: config[name] for name in _SETTINGS}
    settings["model_fingerprint"] = model_fingerprint(config.model)
    settings["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    result = read_result(workdir, settings, {"precisions": _ROW_FIELDS}) or {"settings": settings, "precisions": {}}
    embedding_rules = [(_EMBEDDING, embedding_precision)]
    for precision in precisions:  # reject impossible precisions before measuring
        jax.eval_shape(
            lambda model, rules=[*embedding_rules, (_LAYERS, precision)]: bj.quantize_model(model, rules),
            pretrained.model,
        )

    result["environment"] = environment()
    if "baseline" in result:
        check_rows(workdir / RESULT_NAME, "baseline", [result["baseline"]], [*_ROW_FIELDS, "tokens"])
    else:
        result["baseline"] = _measure("baseline", pretrained, ids, config) | _text_facts(ids, config)
        write_json(workdir / RESULT_NAME, result)
    with progress_bar("quantizing the embedding"):
        model = jax.block_until_ready(bj.quantize_model(pretrained.model, embedding_rules))
    for precision in precisions:
        checkpoint = workdir / f"{precision}.safetensors" if config.checkpoints else None
        if _is_done(result["precisions"].get(str(precision)), checkpoint):
            console.print(f"{precision}: already in {workdir / RESULT_NAME}")
            continue
        started = time.perf_counter()
        with progress_bar(f"{precision}: quantizing"):
            quantized = jax.block_until_ready(bj.quantize_model(model, [(_LAYERS, precision)]))
        seconds = time.perf_counter() - started
        packed = PretrainedModel(quantized, pretrained.tokenizer)
        row = _measure(str(precision), packed, ids, config)
        row["seconds"]["quantize"] = round(seconds, 2)
        row["relative_increase"] = _increase(row, result["baseline"])
        if checkpoint is not None:
            with progress_bar(f"{precision}: writing {checkpoint.name}"):
                save_model(checkpoint, packed, source=config.model)
            row["checkpoint"] = checkpoint.name
            row["checkpoint_bytes"] = checkpoint.stat().st_size
        result["precisions"][str(precision)] = row
        write_json(workdir / RESULT_NAME, result)
    plot_perplexity(result, workdir / "perplexity.png")
    _print_table(result)
    console.print(f"results and checkpoints: {workdir}")


def _is_done(row: dict[str, Any] | None, checkpoint: Path | None) -> bool:
    if row is None or checkpoint is None:
        return row is not None
    if not checkpoint.is_file() or row.get("checkpoint_bytes") != checkpoint.stat().st_size:
        return False
    try:
        bj.load(checkpoint)  # compares every checksum
    except ValueError as error:
        console.print(f"{error}; writing it again")
        return False
    return True


def _measure(name: str, pretrained: PretrainedModel, ids: Sequence[int], config: ConfigDict) -> dict[str, Any]:
    """Perplexity, size in bytes, and a greedy sample of text."""
    started = time.perf_counter()
    with progress_bar(f"{name}: scoring windows", config.windows) as advance:
        scored = perplexity(
            pretrained.model,
            ids,
            windows=config.windows,
            window_length=config.window_length,
            on_window=advance,
        )
    evaluated = time.perf_counter()
    sample, margins = "", []
    if config.sample_tokens:
        prompt = encode(pretrained.tokenizer, config.prompt)
        with progress_bar(f"{name}: generating"):
            (tokens,) = generate(pretrained.model, [prompt], config.sample_tokens)
            margins = _margins(pretrained.model, jnp.asarray([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
        sample = pretrained.tokenizer.decode(tokens)
    return {
        "perplexity": _json_number(scored.perplexity),
        "standard_error": _json_number(scored.standard_error),
        "windows": scored.windows,
        "bytes": _nbytes(pretrained.model),
        "prompt": config.prompt,
        "sample": sample,
        "sample_margins": [round(float(margin), 3) for margin in margins],
        "seconds": {
            "evaluate": round(evaluated - started, 2),
            "sample": round(time.perf_counter() - evaluated, 2),
        },
    }


@jax.jit
def _margins(model: nnx.Module, ids: jax.Array) -> jax.Array:
    """Largest minus second largest logit at each position; where it is small, rounding may change the token."""
    largest, _ = jax.lax.top_k(model(ids), 2)
    return largest[..., 0] - largest[..., 1]


def _text_facts(ids: Sequence[int], config: ConfigDict) -> dict[str, Any]:
    """The scored text: number of predicted tokens, and SHA-256 of the windows' ids as little-endian int32."""
    used = np.asarray(ids[: config.windows * config.window_length], "<i4")
    return {
        "tokens": config.windows * (config.window_length - 1),
        "ids_sha256": hashlib.sha256(used.tobytes()).hexdigest(),
        "text_tokens": len(ids),
    }


def _json_number(x: float) -> float | None:
    """None for NaN (the standard error of one window) and Inf (a loss above 709 nats), which JSON does not have."""
    return x if math.isfinite(x) else None


def _increase(row: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    if row["perplexity"] is None or baseline["perplexity"] is None:
        return None
    return row["perplexity"] / baseline["perplexity"] - 1


def _nbytes(model: nnx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _print_table(result: dict[str, Any]) -> None:
    baseline = result["baseline"]
    scored = f"{baseline['windows']} windows, {baseline['tokens']} tokens of {result['settings']['text']}"
    settings = result["settings"]
    table = Table(title=f"{settings['model']}, calibration {settings['calibration']}, perplexity on {scored}")
    headings = ("precision", "perplexity", "std. error", "increase", "MB", "size", "quantized in", "continues with")
    for heading in headings:
        table.add_column(heading, justify="left" if heading.startswith(("precision", "continues")) else "right")
    for name, row in {"float32": baseline, **result["precisions"]}.items():
        increase, error = _increase(row, baseline), row["standard_error"]
        table.add_row(
            name,
            "inf" if row["perplexity"] is None else f"{row['perplexity']:.5g}",
            "-" if error is None else f"{error:.2g}",
            "-" if increase is None else f"{increase:+.1%}" if increase < 10 else f"x{increase + 1:.0f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes'] / baseline['bytes']:.1%}",
            f"{seconds:.1f} s" if (seconds := row.get("seconds", {}).get("quantize")) is not None else "-",
            row["sample"].replace("\n", " ").strip()[:60],
        )
    console.print(table)


def command() -> None:
    """The command line."""
    app.run(main, example="smollm2")


if __name__ == "__main__":
    command()

"""Times generation of one text on a CPU: a float32 model, and the same model quantized.

    python -m experiments.bench.cpu --config=configs/bench/cpu.py --workdir=DIR

Times are wall time of `generate`, from the call until the tokens are there: of the prompt with its first token, and of
each further token. Models take turns, so that other load on the machine meets all of them. Before timing, each
prepared model must write the tokens of the same model with packed weights. Writes result.json to --workdir.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.transformer import Transformer
from experiments.support import app
from experiments.support.progress import console, progress_bar
from experiments.support.sources import load_model_source, load_text_source
from experiments.support.workdir import RESULT_NAME, environment, write_json

_BASELINE = "float32"
# Tokens that a prepared model and its packed original must both write.
_CHECKED = 4


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    precisions = {name: bj.Precision.parse(name) for name in app.split_names(config.precisions)}
    pretrained = load_model_source(config.model)
    prompt = pretrained.encode(load_text_source("pydoc_topics")[: 8 * config.prompt_tokens])[: config.prompt_tokens]
    models = {_BASELINE: prepare_for_inference(pretrained.model)}
    seconds = {}
    for name, precision in precisions.items():
        rules = [("^layers/", precision)]
        if config.embedding_precision:
            rules.append(("^(embed|lm_head)$", bj.Precision.parse(config.embedding_precision)))
        with progress_bar(f"{name}: quantizing"):
            quantized = bj.quantize_model(pretrained.model, rules)
            started = time.perf_counter()
            models[name] = jax.block_until_ready(prepare_for_inference(quantized))
            seconds[name] = round(time.perf_counter() - started, 2)
        packed = prepare_for_inference(quantized, layout="planes")
        with progress_bar(f"{name}: comparing tokens with those of packed weights"):
            _check_tokens(name, models[name], packed, prompt)
        if config.packed:
            models[f"{name}, packed"] = packed
    rounds = _timed(models, prompt, config)
    result = {
        "settings": config.to_dict(),
        "environment": environment(),
        "models": {
            name: _row(model, rounds[name]) | {"prepare_s": seconds.get(name)} for name, model in models.items()
        },
    }
    baseline = result["models"][_BASELINE]["token_ms"]
    for row in result["models"].values():
        row["times_float32"] = round(row["token_ms"] / baseline, 3)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RESULT_NAME, result)
    _print_table(result)


def _check_tokens(name: str, prepared: Transformer, packed: Transformer, prompt: list[int]) -> None:
    """Raises ValueError unless both models write the same tokens."""
    expected, found = (generate(model, [prompt], _CHECKED, end_ids=()) for model in (packed, prepared))
    if found != expected:
        raise ValueError(f"{name}: the prepared model writes {found}, and with packed weights {expected}")


def _timed(models: dict[str, Transformer], prompt: list[int], config: ConfigDict) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of the prompt and of a further token, in each round; a round before the first compiles."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with progress_bar("timing", config.rounds + 1) as advance:
        for done in range(config.rounds + 1):
            for name, model in models.items():
                first, whole = (_milliseconds(model, prompt, tokens) for tokens in (1, 1 + config.new_tokens))
                runs[name].append({"prompt_ms": first, "token_ms": (whole - first) / config.new_tokens})
            advance(done + 1)
    return {name: rounds[1:] for name, rounds in runs.items()}


def _milliseconds(model: Transformer, prompt: list[int], tokens: int) -> float:
    started = time.perf_counter()
    generate(model, [prompt], tokens, end_ids=())
    return 1e3 * (time.perf_counter() - started)


def _row(model: Transformer, rounds: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(each[name] for each in rounds), 2) for name in rounds[0]}
    every = {f"{name}_of_each_round": [round(each[name], 2) for each in rounds] for name in rounds[0]}
    return {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))} | medians | every


def _print_table(result: dict[str, Any]) -> None:
    settings = result["settings"]
    table = Table(title=f"{settings['model']}, one text, prompt of {settings['prompt_tokens']} tokens, on this CPU")
    for heading in ("model", "MB", "prompt ms", "ms a token", "tokens/s", "times float32"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in result["models"].items():
        cells = (f"{row['bytes'] / 1e6:.0f}", f"{row['prompt_ms']:.0f}", f"{row['token_ms']:.1f}")
        table.add_row(name, *cells, f"{1e3 / row['token_ms']:.1f}", f"{row['times_float32']:.2f}")
    console.print(table)


if __name__ == "__main__":
    app.run(main)

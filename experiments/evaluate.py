"""Scores a model, and compares it with another one on the same windows and questions.

    python -m experiments.evaluate --config=configs/evaluate.py --workdir=DIR \\
        --config.model=PATH --config.against=smollm2 --config.text=PATH --config.windows=20

Perplexity with its standard error; multiple choice from a JSONL file; tasks of lm-evaluation-harness, where that is
installed. Differences are paired: their standard errors are those of the differences of windows and of questions, which
are far smaller than those of each model. Writes result.json to --workdir; a model that it has already is not run again.
With --config.mesh.model=2 packed models are cut over two devices, which changes float sums by their rounding.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.table import Table

from bipolar_jax.extras import require
from bipolar_jax.models.inference.perplexity import Perplexity, paired_difference
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.tokenizer_json import encode
from bipolar_jax.nn import layer_summaries

from .distributed.mesh import cuts_of, mesh_of, packed_on_mesh
from .evaluation.multiple_choice import Question, answer_all, mean_and_error, read_questions
from .support import app
from .support.precision_sweep import scored_windows
from .support.progress import console, progress_bar
from .support.sources import load_model_source, load_text_source, model_fingerprint
from .support.workdir import RESULT_NAME, environment, read_result, write_json

# Settings that the figures depend on.
_SETTINGS = (
    "model",
    "against",
    "bits",
    "activations",
    "cache_bits",
    "text",
    "windows",
    "window_length",
    "questions",
    "tasks",
    "task_limit",
)


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    names = app.split_names(config.tasks)
    mesh_of(config)  # rejects impossible ones
    if not (config.text or config.questions or names):
        raise ValueError("nothing to evaluate: set config.text, config.questions or config.tasks")
    if names:  # before anything is measured
        require("lm_eval", "eval")
        from .evaluation.harness import check_tasks

        check_tasks(names)
    text = load_text_source(config.text) if config.text else ""
    questions = read_questions(Path(config.questions)) if config.questions else []
    sources = {"model": config.model} | ({"against": config.against} if config.against else {})
    settings = {name: config[name] for name in _SETTINGS}
    settings |= {f"{name}_fingerprint": model_fingerprint(source) for name, source in sources.items()}
    settings |= {"text_sha256": _digest(text), "questions_sha256": _digest(repr(questions))}
    result = read_result(workdir, settings, {"models": ("seconds",)}) or {"settings": settings, "models": {}}
    result["environment"] = environment()
    for name, source in sources.items():
        if name in result["models"]:
            console.print(f"{source}: already in {workdir / RESULT_NAME}")
            continue
        options = [config.cache_bits or None, config.activations or None] if name == "model" else [None, None]
        result["models"][name] = _evaluate(source, config, text, questions, names, *options)
        write_json(workdir / RESULT_NAME, result)
    if config.against:
        result["difference"] = _differences(result["models"]["model"], result["models"]["against"])
    write_json(workdir / RESULT_NAME, result)
    _print_table(result, sources)


def _evaluate(
    source: str,
    config: ConfigDict,
    text: str,
    questions: list[Question],
    tasks: list[str],
    cache_bits: int | None,
    activations: int | None,
) -> dict[str, Any]:
    """All figures of one model, JSON. The text is scored with a cache of so many bits."""
    started = time.perf_counter()
    pretrained = load_model_source(source, config.bits or None, activations)
    row: dict[str, Any] = {"linear_bits": _linear_bits(pretrained.model)}
    pretrained = packed_on_mesh(pretrained, mesh_of(config), cuts_of(config))
    if text:
        ids = encode(pretrained.tokenizer, text, add_special_tokens=False)
        used = np.asarray(ids[: config.windows * config.window_length], "<i4")
        options = {"windows_per_step": config.windows_per_step, "cache_bits": cache_bits}
        scored = scored_windows(source, pretrained.model, ids, config, **options)
        row["text"] = {
            "perplexity": _json_number(scored.perplexity),
            "standard_error": _json_number(scored.standard_error),
            "windows": scored.windows,
            "scored_tokens": scored.scored_tokens,
            "window_losses": [_json_number(loss) for loss in scored.window_losses],
            "ids_sha256": hashlib.sha256(used.tobytes()).hexdigest(),
        }
    if questions:
        with progress_bar(f"{source}: answering questions", sum(len(each.choices) for each in questions)) as advance:
            row["questions"] = answer_all(pretrained, questions, advance)
    if tasks:
        from .evaluation.harness import run_tasks

        row["tasks"] = run_tasks(pretrained, tasks, config.task_limit or None)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _linear_bits(model: nnx.Module) -> float | None:
    """Bits a weight that the packed linear layers of blocks take in memory, with scales; None if there are none."""
    packed = [each for each in layer_summaries(model) if each.is_packed and each.path.startswith("layers")]
    return 8 * sum(each.num_bytes for each in packed) / sum(each.parameters for each in packed) if packed else None


def _differences(model: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """What the model has more than the other one: loss of windows, questions answered right."""
    found: dict[str, Any] = {}
    if "text" in model:
        rows = model["text"], against["text"]
        if rows[0]["ids_sha256"] != rows[1]["ids_sha256"]:
            found["text"] = None  # other tokenizers: windows hold other texts
        else:
            difference = paired_difference(*map(_as_perplexity, rows))
            found["text"] = {
                "loss": _json_number(difference.loss),
                "standard_error": _json_number(difference.standard_error),
                "relative_perplexity": _json_number(difference.relative_perplexity),
            }
    if "questions" in model:
        for kind in ("right", "right_by_length"):
            pairs = zip(model["questions"][kind], against["questions"][kind], strict=True)
            mean, error = mean_and_error([int(one) - int(other) for one, other in pairs])
            found[kind] = {"difference": mean, "standard_error": error}
    return found


def _as_perplexity(row: dict[str, Any]) -> Perplexity:
    losses = tuple(math.nan if loss is None else loss for loss in row["window_losses"])
    return Perplexity(math.nan, math.nan, row["windows"], row["scored_tokens"], losses)


def _print_table(result: dict[str, Any], sources: dict[str, str]) -> None:
    table = Table(title="evaluation")
    for heading in (
        "measure",
        *(Path(source).name for source in sources.values()),
        *(["paired difference"] if "difference" in result else []),
    ):
        table.add_column(heading, justify="left" if heading == "measure" else "right", overflow="fold")
    rows, difference = result["models"], result.get("difference", {})
    first = rows["model"]
    if "text" in first:
        cells = [_with_error(rows[name]["text"], "perplexity", "standard_error", ".5g") for name in sources]
        paired = difference.get("text")
        if paired and paired["relative_perplexity"] is not None:
            error = "" if paired["standard_error"] is None else f" ± {paired['standard_error']:.2%}"
            cells.append(f"{paired['relative_perplexity'] - 1:+.2%}{error}")
        elif "text" in difference:
            cells.append("other tokens" if paired is None else "inf")
        table.add_row(f"perplexity, {first['text']['windows']} windows", *cells)
    if any(rows[name].get("linear_bits") for name in sources):
        bits = (rows[name].get("linear_bits") for name in sources)
        table.add_row("bits a weight, packed linear layers", *("-" if each is None else f"{each:.3f}" for each in bits))
    for kind, name in (("right", "accuracy"), ("right_by_length", "accuracy_by_length")):
        if "questions" in first:
            cells = [_with_error(rows[each]["questions"], name, f"{name}_standard_error", ".1%") for each in sources]
            if kind in difference:
                cells.append(_with_error(difference[kind], "difference", "standard_error", "+.1%"))
            table.add_row(f"{name.replace('_', ' ')}, {first['questions']['questions']} questions", *cells)
    for task, metrics in first.get("tasks", {}).items():
        for metric, value in metrics.items():
            others = [rows[name]["tasks"].get(task, {}).get(metric) for name in sources]
            if isinstance(value, float) and "stderr" not in metric:
                table.add_row(f"{task}, {metric}", *("-" if each is None else f"{each:.4g}" for each in others))
    console.print(table)


def _with_error(row: dict[str, Any], name: str, error: str, form: str) -> str:
    """A number and its standard error, such as "20.2 ± 1.3"."""
    if row[name] is None:
        return "inf"
    plain = form.replace("+", "").replace(".5g", ".2g")
    return f"{row[name]:{form}}" + ("" if row[error] is None else f" ± {row[error]:{plain}}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _json_number(x: float) -> float | None:
    """None for NaN and Inf, which JSON does not have."""
    return x if math.isfinite(x) else None


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="evaluate", several_processes=True)


if __name__ == "__main__":
    command()

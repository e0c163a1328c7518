"""What programs that quantize a model to several precisions share: rows of result.json, checkpoints, and the table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.checkpoint import save_model
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.perplexity import Perplexity, perplexity
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.sharding.plan import DATA, plan_shards
from bipolar_jax.models.tokenizer_json import encode

from ..distributed.mesh import cuts_of, mesh_of, packed_on_mesh
from .perplexity_plot import plot_perplexity
from .progress import console, progress_bar
from .sources import load_model_source, load_text_source, model_fingerprint
from .timing import Compilations
from .workdir import RESULT_NAME, check_rows, environment, read_result, write_json

EMBEDDING, LAYERS = "^(embed|lm_head)$", "^layers/"
# Sections of result.json: models that the program makes; and such as are rounded to nearest, to compare them with.
MADE, ROUNDED = "precisions", "rounded"
# The name of the row, and of the checkpoint, of a model whose layers all have rules of their own.
BY_RULES = "rules"
_SCORED_AT_ONCE, _SCORED_AT_ONCE_ON_CPUS = 20, 4  # windows
_ROW_FIELDS = ("perplexity", "standard_error", "windows", "bytes", "sample")

Convert = Callable[[bj.Precision], nnx.Module]


def read_rules(name: str) -> list[list[str | None]]:
    """Rules that come before all others: a JSON file of [[pattern, precision or null], ...]; "" has none.

    Raises:
      ValueError: no such file, or another content.
    """
    if not name:
        return []
    if not Path(name).is_file():
        raise ValueError(f"config.rules is {name}, which is no file: give a JSON file of rules, or leave it empty")
    try:
        rules = json.loads(Path(name).read_text())
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(rules, list) or not all(isinstance(rule, list) and len(rule) == 2 for rule in rules):
        raise ValueError(f'{name} has no rules: write a list such as [["down_proj", "W8A8"], ["k_proj", null]]')
    return rules


def rules_of_row(first: Sequence[Any], precision: bj.Precision | str) -> list[Any]:
    """The rules of a row of the result, after the `first`: the precision is that of all other layers."""
    return [*first] if precision == BY_RULES else [*first, (LAYERS, precision)]


@dataclasses.dataclass
class Loaded:
    """A float model and a text, which runs in one process share.

    Attributes:
      pretrained: the float model.
      ids: of the text.
      text_sha256: of the text.
      baseline: the float model's row, once a run has measured it.
      compilations: of the process, from now on.
    """

    pretrained: PretrainedModel
    ids: Sequence[int]
    text_sha256: str
    baseline: dict[str, Any] | None = None
    compilations: Compilations = dataclasses.field(default_factory=Compilations.listen)

    @classmethod
    def of(cls, config: ConfigDict) -> Loaded:
        """Loads the config's text and model. Raises as the loaders."""
        text = load_text_source(config.text)
        pretrained = load_model_source(config.model)
        ids = encode(pretrained.tokenizer, text, add_special_tokens=False)
        return cls(pretrained, ids, hashlib.sha256(text.encode()).hexdigest())


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A model, a text, and the results so far.

    Attributes:
      config: needs model, text, windows, window_length, embedding_precision, prompt, sample_tokens and checkpoints.
      workdir: folder of the results.
      loaded: the float model and the text.
      result: what result.json holds.
      mesh: of the config; packed models are scored on it, the float one on one device.
    """

    config: ConfigDict
    workdir: Path
    loaded: Loaded
    result: dict[str, Any]
    mesh: Mesh | None = None

    @classmethod
    def begin(
        cls,
        config: ConfigDict,
        workdir: Path,
        fields: Sequence[str],
        sections: Sequence[str] = (MADE,),
        loaded: Loaded | None = None,
        **further: Any,
    ) -> Sweep:
        """Loads model and text, and the results of an earlier run.

        Args:
          config, workdir: see `Sweep`.
          fields: of the config, that the perplexity depends on; all results in a workdir share them.
          sections: of rows, `MADE` and perhaps `ROUNDED`.
          loaded: the config's model and text, where another run has loaded them.
          **further: other settings, JSON.

        Raises:
          ValueError: results with other settings; as the loaders.
        """
        mesh = mesh_of(config)
        loaded = loaded or Loaded.of(config)
        settings = {name: plain(config[name]) for name in fields} | further
        settings["model_fingerprint"] = model_fingerprint(config.model)
        settings["text_sha256"] = loaded.text_sha256
        result = read_result(workdir, settings, dict.fromkeys(sections, _ROW_FIELDS)) or {"settings": settings}
        result |= {section: result.get(section, {}) for section in sections}
        result["environment"] = environment()
        return cls(config, workdir, loaded, result, mesh)

    @property
    def pretrained(self) -> PretrainedModel:
        """The float model."""
        return self.loaded.pretrained

    def check(self, rules: Sequence[tuple[str, bj.Precision | str | None]]) -> None:
        """Raises ValueError if the model cannot be quantized by these rules, or then cut. Nothing is computed."""
        packed = jax.eval_shape(lambda model: bj.quantize_model(model, rules), self.pretrained.model)
        if self.mesh is not None:
            plan_shards(packed, self.mesh.shape, **cuts_of(self.config))

    def measure_baseline(self) -> None:
        """Adds the float model's row, unless it is there."""
        path = self.workdir / RESULT_NAME
        if "baseline" in self.result:
            check_rows(path, "baseline", [self.result["baseline"]], [*_ROW_FIELDS, "tokens"])
            return
        if self.loaded.baseline is None:
            row = measure("baseline", self.pretrained, self.loaded.ids, self.config)
            self.loaded.baseline = row | _text_facts(self.loaded.ids, self.config)
        self.result["baseline"] = self.loaded.baseline
        write_json(path, self.result)

    def is_done(self, precision: bj.Precision, section: str = MADE) -> bool:
        """Whether an earlier run has measured it, and its checkpoint is there."""
        row, checkpoint = self.result[section].get(str(precision)), self._checkpoint(precision, section)
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

    def add(self, precision: bj.Precision, convert: Convert, section: str = MADE) -> None:
        """Quantizes the model, measures it, and writes its checkpoint and its row, unless that is done.

        Args:
          precision: names the row and the checkpoint.
          convert: makes the quantized model.
          section: of the row; only models of `MADE` get a checkpoint.
        """
        name = str(precision) if section == MADE else f"{precision} {section}"
        if self.is_done(precision, section):
            console.print(f"{name}: already in {self.workdir / RESULT_NAME}")
            return
        started, compiled = time.perf_counter(), len(self.loaded.compilations.seconds)
        quantized = jax.block_until_ready(convert(precision))
        seconds, peak = time.perf_counter() - started, peak_bytes()
        packed = self.pretrained.with_model(quantized)
        cache_bits = self.config.get("cache_bits", 0) or None
        row = measure(name, packed, self.loaded.ids, self.config, self.mesh, cache_bits)
        row["seconds"] |= {"quantize": round(seconds, 2), **self.loaded.compilations.since(compiled)}
        row["peak_bytes"] = peak
        row["relative_increase"] = _increase(row, self.result["baseline"])
        checkpoint = self._checkpoint(precision, section)
        if checkpoint is not None:
            with progress_bar(f"{precision}: writing {checkpoint.name}"):
                save_model(checkpoint, packed, source=self.config.model)
            row["checkpoint"] = checkpoint.name
            row["checkpoint_bytes"] = checkpoint.stat().st_size
        self.result[section][str(precision)] = row
        write_json(self.workdir / RESULT_NAME, self.result)

    def show(self, method: str) -> None:
        """Draws the plot and prints the table; `method` says in its title how the weights were rounded."""
        plot_perplexity(self.result, self.workdir / "perplexity.png")
        print_table(self.result, method)
        console.print(f"results and checkpoints: {self.workdir}")

    def _checkpoint(self, precision: bj.Precision, section: str) -> Path | None:
        return self.workdir / f"{precision}.safetensors" if self.config.checkpoints and section == MADE else None


def scored_windows(
    name: str | None, model: nnx.Module, ids: Sequence[int], config: ConfigDict, **options: int | None
) -> Perplexity:
    """`perplexity` of the config's windows, with progress, unless the name is None; `options` are others of it."""
    sizes = {"windows": config.windows, "window_length": config.window_length}
    at_once = _SCORED_AT_ONCE if default_device().platform == "gpu" else _SCORED_AT_ONCE_ON_CPUS
    sizes |= {"windows_per_step": at_once} | options
    if name is None:
        return perplexity(model, ids, **sizes)
    with progress_bar(f"{name}: scoring windows", config.windows) as advance:
        return perplexity(model, ids, on_window=advance, **sizes)


def measure(
    name: str,
    pretrained: PretrainedModel,
    ids: Sequence[int],
    config: ConfigDict,
    mesh: Mesh | None = None,
    cache_bits: int | None = None,
    scored: Perplexity | None = None,
) -> dict[str, Any]:
    """Perplexity, size in bytes, and a greedy sample of text; of a packed model cut over the mesh if there is one.

    With `cache_bits` tokens attend to keys and values as such a cache keeps them, but for the sample's. `scored` is the
    perplexity where that is known.
    """
    num_bytes, pretrained = _nbytes(pretrained.model), packed_on_mesh(pretrained, mesh, cuts_of(config))
    texts = 1 if mesh is None else mesh.shape[DATA]  # the sample's prompt, as often as devices divide texts
    started = time.perf_counter()
    scored = scored or scored_windows(name, pretrained.model, ids, config, cache_bits=cache_bits)
    evaluated = time.perf_counter()
    sample, margins = "", []
    if config.sample_tokens:
        prompt = encode(pretrained.tokenizer, config.prompt)
        with progress_bar(f"{name}: generating"):
            tokens = generate(pretrained.model, [prompt] * texts, config.sample_tokens)[0]
            ids_of_sample = jnp.asarray([prompt + tokens[:-1]] * texts)
            margins = _margins(pretrained.model, ids_of_sample)[0, len(prompt) - 1 :]
        sample = pretrained.tokenizer.decode(tokens)
    return {
        "perplexity": _json_number(scored.perplexity),
        "standard_error": _json_number(scored.standard_error),
        "windows": scored.windows,
        "window_losses": [_json_number(round(loss, 6)) for loss in scored.window_losses],
        "bytes": num_bytes,
        "prompt": config.prompt,
        "sample": sample,
        "sample_margins": [round(float(margin), 3) for margin in margins],
        "seconds": {
            "evaluate": round(evaluated - started, 2),
            "sample": round(time.perf_counter() - evaluated, 2),
        },
    }


def peak_bytes() -> int:
    """The most memory that this process has taken so far: of its device, or of the host where that is the device."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


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


def plain(value: Any) -> Any:
    """A field of a config as JSON has it, whose lists are no tuples."""
    return json.loads(json.dumps(value.to_dict() if isinstance(value, ConfigDict) else value))


def _json_number(x: float) -> float | None:
    """None for NaN (the standard error of one window) and Inf (a loss above 709 nats), which JSON does not have."""
    return x if math.isfinite(x) else None


def _increase(row: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    if row["perplexity"] is None or baseline["perplexity"] is None:
        return None
    return row["perplexity"] / baseline["perplexity"] - 1


def _nbytes(model: nnx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def print_table(result: dict[str, Any], method: str) -> None:
    """Prints the rows of a result; `method` says in the title how the weights were rounded."""
    baseline = result["baseline"]
    scored = f"{baseline['windows']} windows, {baseline['tokens']} tokens of {result['settings']['text']}"
    settings = result["settings"]
    table = Table(title=f"{settings['model']}, {method}, perplexity on {scored}")
    headings = ("precision", "perplexity", "std. error", "increase", "MB", "size", "quantized in", "continues with")
    for heading in headings:
        table.add_column(heading, justify="left" if heading.startswith(("precision", "continues")) else "right")
    rounded = {f"{name} {ROUNDED}": row for name, row in result.get(ROUNDED, {}).items()}
    for name, row in {"float32": baseline, **rounded, **result[MADE]}.items():
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

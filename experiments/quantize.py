"""Quantizes a language model to several precisions and measures the perplexity and size of each.

    python -m experiments.quantize --config=configs/smollm2.py --workdir=DIR \\
        --config.text=PATH --config.windows=20 --config.precisions=W8A8,W4A8g64

Writes to --workdir result.json, perplexity.png and, per precision, a packed checkpoint that
experiments/generate.py reads. A stopped run resumes.
"""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

import bipolar_jax as bj

from .support import app
from .support.precision_sweep import EMBEDDING, LAYERS, Sweep
from .support.progress import progress_bar

# Settings that the perplexity depends on.
_SETTINGS = ("model", "text", "windows", "window_length", "embedding_precision", "calibration")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    precisions = [bj.Precision.parse(text, config.calibration) for text in config.precisions.split(",")]
    embedding_rules = [(EMBEDDING, bj.Precision.parse(config.embedding_precision, config.calibration))]
    sweep = Sweep.begin(config, workdir, _SETTINGS)
    for precision in precisions:  # reject impossible precisions before measuring
        sweep.check([*embedding_rules, (LAYERS, precision)])
    sweep.measure_baseline()
    with progress_bar("quantizing the embedding"):
        model = jax.block_until_ready(bj.quantize_model(sweep.pretrained.model, embedding_rules))

    def quantize(precision: bj.Precision) -> nnx.Module:
        with progress_bar(f"{precision}: quantizing"):
            return jax.block_until_ready(bj.quantize_model(model, [(LAYERS, precision)]))

    for precision in precisions:
        sweep.add(precision, quantize)
    sweep.show(f"calibration {config.calibration}")


def command() -> None:
    """The command line."""
    app.run(main, example="smollm2")


if __name__ == "__main__":
    command()

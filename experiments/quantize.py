"""Quantizes a language model to several precisions and measures the perplexity and size of each.

    python -m experiments.quantize --config=configs/smollm2.py --workdir=DIR \\
        --config.text=PATH --config.windows=20 --config.precisions=W8A8,W4A8g64

Writes to --workdir result.json, perplexity.png and, per precision, a packed checkpoint that
experiments/generate.py reads. A stopped run resumes. With --config.mesh.model=2 two devices score packed models.
"""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.models.inference.xla_flags import pin_float_products

from .support import app
from .support.precision_sweep import BY_RULES, EMBEDDING, Sweep, read_rules, rules_of_row
from .support.progress import progress_bar

# Settings that the perplexity depends on.
_SETTINGS = ("model", "text", "windows", "window_length", "embedding_precision", "calibration")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    calibration = config.calibration or None
    own_rules = read_rules(config.rules)
    precisions = [bj.Precision.parse(text, calibration) for text in app.split_names(config.precisions)]
    if not precisions and not own_rules:
        raise ValueError("config.precisions is empty: name at least one, such as W8A8, or give config.rules")
    first_rules = [(pattern, text and bj.Precision.parse(text, calibration)) for pattern, text in own_rules]
    first_rules += [(EMBEDDING, bj.Precision.parse(config.embedding_precision, calibration))]
    sweep = Sweep.begin(config, workdir, _SETTINGS, **({"rules": own_rules} if own_rules else {}))
    precisions = precisions or [BY_RULES]
    for precision in precisions:  # reject impossible precisions before measuring
        sweep.check(rules_of_row(first_rules, precision))
    sweep.measure_baseline()

    def quantize(precision: bj.Precision | str) -> nnx.Module:
        with progress_bar(f"{precision}: quantizing"):
            rules = rules_of_row(first_rules, precision)
            return jax.block_until_ready(bj.quantize_model(sweep.pretrained.model, rules))

    for precision in precisions:
        sweep.add(precision, quantize)
    sweep.show(f"rounded to nearest, {config.calibration or 'default'} grids")


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="smollm2")


if __name__ == "__main__":
    command()

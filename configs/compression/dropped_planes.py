"""Packed checkpoints at 8, 6 and 4 bits, on CPython's help topics, beside the float model.

    python -m experiments.calibrate --config=configs/calibrate.py --workdir=runs/nested \\
        --config.precisions=W8A8 --config.rounding.nested="(6, 4)"
    python -m experiments.dropped_planes --config=configs/compression/dropped_planes.py --workdir=runs/dropped_planes \\
        --config.models=runs/nested/W8A8.safetensors
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Packed checkpoints, comma separated.
    config.models = ""
    # The float model: "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.against = "smollm2"
    # Most weight bits to read, comma separated; a checkpoint that has fewer is left out.
    config.bits = "8,6,4"
    # Text that is scored: "pydoc_topics" (CPython's help topics), "python_stdlib" (its source) or a UTF-8 file.
    config.text = "pydoc_topics"
    # Number of scored windows, tokens per window, and windows that run at once.
    config.windows = 20
    config.window_length = 512
    config.windows_per_step = 4
    # Devices that texts (data) and weights (model) of packed models are divided over; the float model runs on one.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    return config

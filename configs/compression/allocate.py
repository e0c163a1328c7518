"""SmolLM2-135M: which layers get how many bits, four on average.

    python -m experiments.allocate --config=configs/compression/allocate.py --workdir=runs/allocated
    python -m experiments.calibrate --config=configs/calibrate.py --workdir=runs/calibrated --config.precisions= \\
        --config.rules=runs/allocated/rules_4.0.json
"""

from ml_collections import ConfigDict

from . import calibrate


def get_config() -> ConfigDict:
    whole = calibrate.get_config()
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = whole.model
    # What layers may get, comma separated.
    config.precisions = "W2A8g192,W3A8g192,W4A8g192,W5A8g192,W6A8g192"
    # Largest costs of the decoder's linear layers in the unit, comma separated; a precision stands for its own cost.
    config.budget = "4.0"
    # "bits" (a weight, scales and offsets included), "bytes" or "milliseconds" (of the products, measured here).
    config.unit = "bits"
    # Most runs of consecutive layers that are packed alike; each is compiled by itself.
    config.runs = 4
    # Whether all sites of a layer get the same precision, so that Hopper GPUs decode each run of layers as one kernel.
    config.alike = False
    # Tokens of the products that are timed, with the unit "milliseconds".
    config.timed_tokens = 1
    # Text that is calibrated with: see configs/calibrate.py.
    config.calibration_text = whole.calibration_text
    config.calibration_windows = whole.calibration_windows
    config.calibration_length = whole.calibration_length
    # Windows of it that losses are measured with.
    config.sensitivity_windows = 8
    # Windows that run at once.
    config.windows_per_step = whole.windows_per_step
    config.rotation = whole.rotation
    config.rotation_block = whole.rotation_block
    config.rounding = whole.rounding
    # Of the rotation, and of the text that the model writes.
    config.seed = whole.seed
    # One of the precisions: only calibrate it, so that several processes share the work; "" for the whole program.
    config.only = ""
    # Devices that divide the windows that losses are measured with, data x model of them; each has all weights. One
    # device calibrates, writes the calibration text and times products: the unit "milliseconds" takes no mesh.
    config.mesh = ConfigDict({"data": 1, "model": 1})
    return config

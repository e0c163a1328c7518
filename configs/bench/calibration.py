"""Parts of calibrating one block: SmolLM2's shapes or Llama-3-8B's, random weights, 128 windows of 512 tokens.

python -m experiments.bench.calibration --config=configs/bench/calibration.py --workdir=runs/bench_calibration
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Of `bipolar_jax.models.presets`; its first `blocks` blocks. The first block's time has the compilations.
    config.model = "smollm2-135m"
    config.blocks = 3
    config.dtype = "float32"
    # "full", "foldable" or "none".
    config.rotation = "full"
    config.precision = "W4A8g64"
    config.windows = 128
    config.length = 512
    config.windows_per_step = 16
    # Parts that are timed, comma separated: "calibrate", "moments", "rounding", "write".
    config.parts = "calibrate,moments,rounding,write"
    # Timed runs of each stage of "moments" and "rounding", after one that compiles.
    config.iterations = 2
    config.seed = 0
    return config

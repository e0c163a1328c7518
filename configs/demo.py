"""SmolLM2-135M at 4 bits, rounded to nearest and calibrated: `make demo`.

Claim: PLACEHOLDER

    python -m experiments.calibrate --config=configs/demo.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from . import calibrate


def get_config() -> ConfigDict:
    config = calibrate.get_config()
    config.precisions = "W4A8g64"
    config.rounded = "W8A8,W4A8,W4A8g64"
    config.windows = 8
    # 128 windows lower the perplexity by another percent, and take ten times as long.
    config.calibration_windows = 8
    config.prompt = "The capital of France is"
    config.sample_tokens = 32
    return config

"""Training of one feed-forward block (2048 x 8192, as in Llama 3.2 1B) on one NVIDIA H100.

Claim: the forward pass, which includes quantizing and packing the weights, is 1.25 times as fast as bf16 at W8A8, 1.28
times at W4A4 and 1.72 times at W2A2. A whole step, whose backward pass is bf16, is 0.98, 1.01 and 1.11 times as fast.
Five minutes, mostly compilation.

    python -m experiments.bench.training_step --config=configs/bench/training_step.py --workdir=runs/training_step
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.hidden_size = 2048
    config.ffn_size = 8192
    config.tokens = 8192
    # Precisions; bf16 is always measured too.
    config.precisions = "W8A8,W4A8,W4A4,W2A2,W1A1"
    # Calibration of the weights, repeated in every step: "absmax", "minmax" or "mse".
    config.calibration = "absmax"
    config.implementation = "auto"
    # Timed runs of each function; the median is reported.
    config.iterations = 20
    # Number of kernels to list per function, slowest first; 0 skips the profile.
    config.profile_most = 12
    config.seed = 0
    return config

"""Training the feed-forward block of a model of a billion parameters (Llama 3.2 1B's: 2048 x 8192) on one NVIDIA H100.

Claim: the forward pass, in which weights are rounded and packed, is 1.25 times as fast as bf16's at W8A8, 1.28 times at
W4A4 and 1.72 times at W2A2; a whole step, which has bf16's backward pass, 0.98, 1.01 and 1.11 times. Five minutes, most
of them to compile.

    python -m experiments.bench.training_step --config=configs/bench/training_step.py --workdir=runs/training_step
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.hidden_size = 2048
    config.ffn_size = 8192
    config.tokens = 8192
    # Comma separated; bf16 is always measured.
    config.precisions = "W8A8,W4A8,W4A4,W2A2,W1A1"
    # Of the weights, in every step: "absmax", "minmax" or "mse".
    config.calibration = "absmax"
    config.implementation = "auto"
    # Timed runs of each function; their median is reported.
    config.iterations = 20
    # Kernels to list of each function, those that take longest.
    config.profile_most = 12
    config.seed = 0
    return config

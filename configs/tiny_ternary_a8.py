"""The model of tiny_bf16.py with ternary weights and 8-bit activations, as BitNet b1.58 (arXiv 2402.17764).

Claim: a final validation loss of 1.68, 0.08 nats above that of tiny_bf16.py, and a least loss of 1.55 at step 4500,
0.03 nats above its least. Seven minutes beside three other runs on one H100.

    python -m experiments.train --config=configs/tiny_ternary_a8.py --workdir=runs/tiny_ternary_a8
"""

from ml_collections import ConfigDict

from .tiny_base import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config("tiny_ternary_a8")
    config.rules = (("^layers/", "W1.58A8"),)
    config.quantization.calibration = "absmean"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.weight_decay = 0.5
    return config

"""The model of tiny_bf16.py with ternary weights and 8-bit activations, as BitNet b1.58 (arXiv 2402.17764).

Expected, not yet measured: a validation loss 0.05 to 0.2 nats above that of tiny_bf16.py; two to three minutes on one
H200.

    python -m experiments.train --config=configs/tiny_ternary_a8.py --workdir=runs/tiny_ternary_a8
"""

from ml_collections import ConfigDict

from configs.tiny_base import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config("tiny_ternary_a8")
    config.rules = (("^layers/", "W1.58A8"),)
    config.quantization.calibration = "absmean"
    return config

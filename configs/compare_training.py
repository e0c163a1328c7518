"""The tiny configs' runs beside each other: validation losses of low bits less that of bf16.

python -m experiments.compare_training --config=configs/compare_training.py --workdir=runs/compare_training
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Workdirs of experiments/train.py, joined by commas.
    config.runs = "runs/tiny_bf16,runs/tiny_ternary_a8,runs/tiny_w2a2,runs/tiny_w1a1"
    # The one that the others are compared with, by its config's name.
    config.baseline = "tiny_bf16"
    return config

"""Validation losses of the tiny configs' runs, compared with bf16.

python -m experiments.compare_training --config=configs/compare_training.py --workdir=runs/compare_training
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Workdirs of experiments/train.py, comma separated.
    config.runs = "runs/tiny_bf16,runs/tiny_ternary_a8,runs/tiny_w2a2,runs/tiny_w1a1"
    # `name` in the config of the baseline run.
    config.baseline = "tiny_bf16"
    # Devices, as all programs have them; results are read on the host, so that more of them change nothing.
    config.mesh = ConfigDict({"data": 1, "model": 1})
    return config

"""Llama-3-8B of few bits with scales of groups, one text, beside bf16 on one NVIDIA H200: 2 minutes.

Claim: see experiments/results/README.md, Integer groups.

    python -m experiments.side_by_side --config=configs/side_by_side/llama3_groups.py --workdir=runs/llama3_groups
"""

from ml_collections import ConfigDict

_PRECISIONS = (
    "W4A8g128,W4A8g64,W4A8g32,W3A8g128,W2A8g64,W1A8g128,W4A16g128,W4A8,W4A8g128f,W4A8g32f"  # in the order they start
)
_COMMAND = (
    "bench.llm --config=configs/bench/llm.py --config.model=llama-3-8b --config.calibration= --config.iterations=5 "
    "--config.profile= --config.workloads=1x1024+48,1x2048+1 "
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Commands by chain: a program of experiments/ with its arguments, or a tuple of them that run one after another.
    config.chains = ConfigDict(
        {"bf16": f"{_COMMAND} --config.precisions= '--config.baselines=bf16 cuBLAS'"}, sort_keys=False
    )
    for precision in _PRECISIONS.split(","):
        options = "--config.baselines= --config.embed_bits=8"
        config.chains[precision] = f"{_COMMAND} {options} --config.precisions={precision}"
    # Chains to run, comma separated; "" for all.
    config.only = ""
    # Chains that run at a time: a card of 141 GB holds six such models while they are made.
    config.at_once = 6
    # Seconds after which all are killed; 0 has no limit.
    config.seconds = 0.0
    return config

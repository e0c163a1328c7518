"""Llama-3-8B decoding 4, 16 and 64 texts at several precisions, beside bf16 on one NVIDIA H200: 4 minutes.

Claim: see experiments/results/README.md, Integer groups.

    python -m experiments.side_by_side --config=configs/side_by_side/llama3_texts.py --workdir=runs/llama3_texts
"""

from ml_collections import ConfigDict

from . import llama3_groups

_PRECISIONS = "W4A8g128,W4A16g128,W4A8,W3A8g128,W2A8g64,W1A8g128,W8A8,W2A2"  # in the order they start
_COMMAND = (
    "bench.llm --config=configs/bench/llm.py --config.model=llama-3-8b --config.calibration= --config.iterations=5 "
    "--config.profile= --config.workloads=4x1024+24,16x480+24,64x256+24 "
)


def get_config() -> ConfigDict:
    config = llama3_groups.get_config()
    config.chains = ConfigDict(
        {"bf16": f"{_COMMAND} --config.precisions= '--config.baselines=bf16 cuBLAS'"}, sort_keys=False
    )
    for precision in _PRECISIONS.split(","):
        config.chains[precision] = f"{_COMMAND} --config.baselines= --config.precisions={precision}"
    return config

"""The four optimizations of the matmul disabled one at a time, on one NVIDIA H200.

Claim: the matmul takes 2.0 to 3.6 times as long with recovery through memory, 1.5 to 3.0 times with packing in every
call, up to 7% longer with one tiling for all problems, and no longer with signed planes. One to two minutes.

    python -m experiments.bench.ablation --config=configs/bench/ablation.py --workdir=runs/ablation
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Notation as in configs/bench/matmul.py; precisions have at most 8 pairs of planes.
    config.shapes = "8192,4096,llama2-7b/down@2048,llama2-7b/o@1024"
    config.precisions = "W1A2,W2A2"
    # Tiling of the variant "fixed tiling": the one that is best for most problems.
    config.fixed_tiling = ConfigDict(
        {"tile_m": 128, "tile_n": 128, "schedule": "alternate", "slots": 5, "band": 8, "band_axis": "n"}
    )
    config.iterations = 20
    config.compile_threads = 8
    config.seed = 0
    return config

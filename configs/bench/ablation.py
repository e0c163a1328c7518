"""The four parts of the scheme switched off one at a time, on one NVIDIA H200.

Claim: recovery through memory costs 2.0 to 3.6 times the full system, packing in the call 1.5 to 3.0 times, a
fixed tile shape up to 7%, and signs nothing. A minute or two.

    python -m experiments.bench.ablation --config=configs/bench/ablation.py --workdir=runs/ablation
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # As in configs/bench/matmul.py; precisions of at most 8 pairs of planes.
    config.shapes = "8192,4096,llama2-7b/down@2048,llama2-7b/o@1024"
    config.precisions = "W1A2,W2A2"
    # The tile shape of the variant that has one for all problems: the one that suits most of them.
    config.fixed_tiling = ConfigDict(
        {"tile_m": 128, "tile_n": 128, "schedule": "alternate", "slots": 5, "band": 8, "band_axis": "n"}
    )
    config.iterations = 20
    config.compile_threads = 8
    config.seed = 0
    return config

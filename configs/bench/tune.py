"""Tilings of the Hopper kernel for the shapes and precisions of configs/bench/matmul.py.

Claim: the best tiling is at most 15% faster than what the planner's estimate chooses without a table.
With one process a shape (see `experiments.support.turns`) 36 problems with 13 tilings each take two minutes on one
NVIDIA H200. The table goes to bipolar_jax/tuning/, or to --config.table.

    python -m experiments.bench.tune --config=configs/bench/tune.py --workdir=runs/tune_matmul

Few tokens: --config.shapes=llama2-7b@1,llama2-7b@16 --config.precisions=W1A8,W2A8,W4A8,W8A8.
"""

from ml_collections import ConfigDict

from configs.bench import matmul


def get_config() -> ConfigDict:
    config = ConfigDict()
    bench = matmul.get_config()
    # As in configs/bench/matmul.py; products of as many pairs of planes, and all of more than 8, are one problem.
    config.shapes = bench.shapes
    config.precisions = "W1A1,W1A2,W2A2,W2A3,W2A4,W4A8"
    # Where tile shapes come from: "planner" (the planner's own list) or "all" (every tile and schedule too).
    config.candidates = "all"
    # Tile shapes that are timed for each problem, best estimates first; then variations of the fastest, 0 for none.
    config.per_problem = 6
    config.variations = 10
    # The JSON table to update; "" is the one that the package reads for this device.
    config.table = ""
    config.iterations = 20
    config.compile_threads = 8
    config.seed = 0
    config.ceilings = bench.ceilings
    return config

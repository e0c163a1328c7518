"""Tilings of the Hopper kernel for the shapes and precisions of configs/bench/matmul.py.

Claim: the best tiling is at most 15% faster than the one that the planner's estimate chooses without a table. 36
problems with 13 tilings each take two minutes on one NVIDIA H200 with one process per shape (see
experiments/support/device_lock.py).

    python -m experiments.bench.tune --config=configs/bench/tune.py --workdir=runs/tune_matmul

Few tokens: --config.shapes=llama2-7b@1,llama2-7b@16 --config.precisions=W1A8,W2A8,W4A8,W8A8.
"""

from ml_collections import ConfigDict

from . import matmul


def get_config() -> ConfigDict:
    config = ConfigDict()
    bench = matmul.get_config()
    # Products with equally many pairs of planes are one problem, and so are all int8 products.
    config.shapes = bench.shapes
    config.precisions = "W1A1,W1A2,W2A2,W2A3,W2A4,W4A8"
    # Tilings to choose from: "planner" (the planner's list) or "all" (every tile shape and schedule in addition).
    config.candidates = "all"
    # Tilings to time per problem, best estimates first, and variations of the fastest one.
    config.per_problem = 6
    config.variations = 10
    # JSON table to update; "" is this device's table in bipolar_jax/tuning/.
    config.table = ""
    config.iterations = 20
    config.compile_threads = 8
    config.seed = 0
    config.ceilings = bench.ceilings
    return config

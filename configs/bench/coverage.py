"""60 drawn shapes at nine precisions on one NVIDIA H200: which operations lose to bf16, and which plans to others.

Claim: none. A first run on a GPU measured while other processes traced, which starved the launches; tests run this
method on tiny shapes.

    python -m experiments.bench.coverage --config=configs/bench/coverage.py --workdir=runs/coverage
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Shapes from the draw of `seed`, beginning with the `first`.
    config.shapes = 60
    config.first = 0
    config.seed = 0
    config.precisions = "W1A1,W2A2,W2A4,W4A4,W4A8,W8A8,W4A8g128,W2A8g64,W4A16g128"
    # Weights as "models" has them that are prepared for inference, or all as "planes" or for "tensor_cores".
    config.layout = "models"
    config.implementation = "auto"
    # Other plans to time beside the chosen one.
    config.plans = 2
    # "i/n": every n-th of the shapes, from the i-th on.
    config.part = "0/1"
    # Cases that are compiled before they are measured: nobody compiles while another process measures.
    config.batch = 36
    # Starts no case after so many seconds, of which 0.4 are for compilation and 0.15 for profiles; 0 has no limit.
    config.seconds = 0.0
    # Prints the table of what is measured, and measures nothing.
    config.report = False
    # Multiplications from which a product must not be slower than bf16, and the least speeds, as shares of bf16's.
    config.counted = 2**31
    config.least = 0.97
    config.least_float = 0.95
    # How many times as long as the best plan the chosen one may take.
    config.most_over_best = 1.1
    config.iterations = 5
    config.compile_threads = 2
    return config

"""Calls outside of `jax.jit` at 8 x 512 x 512: compilations, time, and memory that stays behind.

Claim: no call of a warm shape compiles; `matmul` and a packed layer take at most 1 ms, the gradient of a layer 5 ms,
and `model(ids)` 1.2 times its jitted time plus 5 ms; 2,000 calls leave no memory behind. Half a minute on two cores.

    python -m experiments.bench.eager --config=configs/bench/eager.py --workdir=runs/eager
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # What is called, comma separated; "" is all of it.
    config.pieces = ""
    # Rows of the input, and both sizes of the weights.
    config.rows, config.size = 8, 512
    # Precision of all weights.
    config.precision = "W4A8"
    # Timed calls, of which the median is reported.
    config.timed_calls = 100
    # Calls between the two readings of the process's memory.
    config.memory_calls = 2000
    return config

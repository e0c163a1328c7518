"""Matrix products of 1 to 8 bits on one NVIDIA H200, against XLA's bf16 and int8 products in the same run.

Claim: every compared number is exact; W1A1 is more than 9 times as fast as bf16 at 4096^3 and 14 times at 8192^3; no
precision's kernel is slower than bf16. All 64 pairs of bits take five minutes with one process per shape (see
experiments/support/device_lock.py).

    python -m experiments.bench.matmul --config=configs/bench/matmul.py --workdir=runs/bench_matmul
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "4096" (a square), "8192x8192x16384" (m x n x k), "llama2-7b@2048", "opt-6.7b/fc2@1024", "squares", "all".
    config.shapes = "8192,4096,llama2-7b@2048"
    # Precisions, or "all" for the 64 pairs of bits.
    config.precisions = "W1A1,W1A2,W2A1,W2A2,W1A4,W4A1,W2A3,W3A2,W1A8,W2A8,W3A4,W4A4,W4A8,W4A8g128,W8A8"
    # "sm90"; with "xla" or "reference" only the operation is timed.
    config.implementation = "sm90"
    # Timed runs of each function; the median is reported.
    config.iterations = 20
    # Concurrent compilations.
    config.compile_threads = 8
    config.seed = 0
    # Other libraries to time on the same shapes, from "torch,gemlite,humming".
    config.peers = ""
    # What Humming multiplies, beside this project's product of the same weights.
    config.peer_precisions = "W8A8,W4A8,W4A8g128,W4A16g128,W2A8g64,W1A8g128"
    # The quantizer is also timed separately for activations with at least this many elements.
    config.quantizer_elements = 16 * 2**20
    # Number of random ragged shapes, and their largest size, on which whole products of all 72 pairs of formats are
    # checked.
    config.exactness_shapes = 0
    config.exactness_size = 700
    # Peak rates of the H200: operations per second of each type, and bytes per second.
    config.ceilings = ConfigDict({"binary": 15.4e15, "int8": 1.93e15, "bf16": 0.93e15, "bandwidth": 4.1e12})
    return config

"""Matrix products of 1 to 8 bits on one NVIDIA H200, against XLA's bf16 and int8 products in the same run.

Claim: every sample compared is exact; W1A1 is more than 9 times as fast as bf16 at 4096^3 and 14 times at
8192^3; no pair's kernel is slower than bf16. With one process a shape (see `experiments.support.turns`) all 64 pairs
take five minutes.

    python -m experiments.bench.matmul --config=configs/bench/matmul.py --workdir=runs/bench_matmul
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Squares "4096", sizes "8192x8192x16384" (m x n x k), "llama2-7b@2048", "opt-6.7b/fc2@1024", "squares", "all".
    config.shapes = "8192,4096,llama2-7b@2048"
    # Comma separated, or "all" for the 64 pairs.
    config.precisions = "W1A1,W1A2,W2A1,W2A2,W1A4,W4A1,W2A3,W3A2,W1A8,W2A8,W3A4,W4A4,W4A8,W4A8g128,W8A8"
    # "sm90", or a backend that has no kernel alone: "xla", "reference".
    config.implementation = "sm90"
    # Timed runs of each function; their median is reported.
    config.iterations = 20
    # Functions that are compiled at a time.
    config.compile_threads = 8
    config.seed = 0
    # Other libraries to time on the same shapes, of "torch,gemlite,humming".
    config.peers = ""
    # Activations with at least so many numbers are also quantized and packed by themselves.
    config.quantizer_elements = 16 * 2**20
    # Random ragged shapes, with sizes up to the second number, on which all 72 pairs of formats are compared whole.
    config.exactness_shapes = 0
    config.exactness_size = 700
    # Operations and bytes a second, measured on the H200 (DESIGN.md, section 3).
    config.ceilings = ConfigDict({"binary": 15.4e15, "int8": 1.93e15, "bf16": 0.93e15, "bandwidth": 4.1e12})
    return config

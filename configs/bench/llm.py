"""Llama-2-7B's prefill and decoding at 1 to 8 bits on one NVIDIA H200, against bf16 in the same run.

Claim: a decode step after 1024 tokens takes 0.86 ms at W1A1, 1.12 at W2A8, 1.48 at W4A8 and 2.28 at W8A8, where bf16
takes 4.57; a prompt of 2048 tokens is read 5.1 times as fast as in bf16 at W1A1, 3.1 at W2A2 and 1.8 at W4A8, and 16
of 480 tokens 7.3 times at W1A1. Measured with --config.workloads=1x1024+64,1x2048+64 and 16x480+32; the default
workloads were not run yet.

    python -m experiments.bench.llm --config=configs/bench/llm.py --workdir=runs/bench_llm
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # A name of bipolar_jax/models/presets.py.
    config.model = "llama-2-7b"
    # Of the decoder's linear layers, comma separated.
    config.precisions = "W1A1,W1A2,W2A2,W1A8,W2A8,W4A8,W8A8"
    # What they are compared with; one of several runs that share a workdir measures it, the others none.
    config.baselines = "bf16,bf16 cuBLAS"
    # Batch x prompt + new tokens.
    config.workloads = "1x512+128,8x512+128,1x2048+128,8x2048+128"
    # Bits of the embedding and the output layer in the packed models; 0 leaves them in bf16, as bf16's are.
    config.embed_bits = 0
    # Bits of cached keys and values, 8 or 4; 0 keeps them in bf16. The same for bf16's.
    config.cache_bits = 0
    # The packed layers' backend.
    config.implementation = "auto"
    # Timed runs of each function; their median is reported.
    config.iterations = 10
    config.seed = 0
    # Precisions whose kernels are listed, on the first workload; "bf16" and "bf16 cuBLAS" can be among them.
    config.profile = "W2A2"
    config.profile_most = 15
    # Other libraries to time: "transformers".
    config.peers = ""
    # Bytes a second that an H200 reads and writes.
    config.ceilings = ConfigDict({"bandwidth": 4.1e12})
    return config

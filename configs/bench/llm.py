"""Prefill and decoding of Llama-2-7B at 1 to 8 bits on one NVIDIA H200, against bf16 in the same run.

Claim, with --config.workloads=1x1024+64,1x2048+64: a decode step after 1024 tokens takes 0.86 ms at W1A1, 1.12 ms at
W2A8, 1.48 ms at W4A8 and 2.27 ms at W8A8, against 4.57 ms in bf16. Prefill of 2048 tokens is 5.1 times as fast as bf16
at W1A1, 3.1 times at W2A2 and 1.8 times at W4A8. With --config.workloads=16x480+32 prefill at W1A1 is 7.3 times as
fast. The default workloads have not been measured.

    python -m experiments.bench.llm --config=configs/bench/llm.py --workdir=runs/bench_llm
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # A preset of bipolar_jax/models/presets.py; or a GGUF file or a quantized Hugging Face directory (with a "/").
    config.model = "llama-2-7b"
    # Precisions of the decoder's linear layers; of a file its activations, such as "A8,A16".
    config.precisions = "W1A1,W1A2,W2A2,W1A8,W2A8,W4A8,W8A8"
    # How the scales of weights are chosen. "absmax" has no offsets; "" is the default of each width.
    config.calibration = "absmax"
    # Baselines; of several runs that share a workdir one measures them, the others set "".
    config.baselines = "bf16,bf16 cuBLAS"
    # Batch x prompt length + new tokens.
    config.workloads = "1x512+128,8x512+128,1x2048+128,8x2048+128"
    # Weight bits of the embedding and the output layer in packed models; 0 keeps them in bf16, as in the baselines.
    config.embed_bits = 0
    # Numbers of them that share a scale, such as 128 beside 4 or 6 bits; 0 has one scale a row.
    config.embed_group_size = 0
    # Of packed weights: "planes", "bytes", "tensor_cores", or "" for what `prepare_for_inference` chooses.
    config.layout = ""
    # Sequences that packed models decode in one kernel, where a backend has it: up to 4.
    config.fused_sequences = 4
    # Devices that texts (data) and weights (model) of packed models are divided over; the baselines run on one.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    # Whether packed models compute what `bj.compress.rotate(model, "full")` leaves to run time: R4, and with a cache of
    # 4 bits R3.
    config.rotated = False
    # Numbers that R4 mixes; 0 mixes as many as can be.
    config.rotation_block = 0
    # Bits of cached keys and values in all models: 8, 4, or 0 for bf16.
    config.cache_bits = 0
    # Backend of the packed layers: "auto", "sm90", "xla" or "reference".
    config.implementation = "auto"
    # Timed runs of each function; the median is reported.
    config.iterations = 10
    config.seed = 0
    # Precisions and baselines whose kernels are listed, for the first workload.
    config.profile = "W2A2"
    config.profile_most = 15
    # Other libraries to time: "transformers", or "" for none.
    config.peers = ""
    # Memory bandwidth of the H200 in bytes per second, for the bandwidth share in the result.
    config.ceilings = ConfigDict({"bandwidth": 4.1e12})
    return config

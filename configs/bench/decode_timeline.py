"""Where a decode step of Llama-3-8B spends its time after 1024 tokens, phase by phase, on one NVIDIA H200.

Claim: all layers take 1.41 ms at W4A8g128.

    python -m experiments.bench.language_models.decode_timeline --config=configs/bench/decode_timeline.py --workdir=DIR
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # A preset of bipolar_jax/models/presets.py, with SwiGLU and rotary positions.
    config.model = "llama-3-8b"
    # Precisions of the decoder's linear layers.
    config.precisions = "W4A8g128i,W2A8g64i,W1A8g128i"
    # How attention is divided: "shared chunks" for four heads of the same keys, "own chunks" for each warpgroup.
    config.variants = "shared chunks,own chunks"
    # Of the weights: "planes", "tensor_cores", or "" for what `prepare_for_inference` chooses.
    config.layout = ""
    # Texts that are decoded at once; several with integer scales of groups, or without.
    config.texts = 1
    # Tokens in the cache, of each text.
    config.length = 1024
    # Steps that are timed; the readings are those of the last.
    config.iterations = 20
    config.seed = 0
    # Whether all readings are written to --workdir: 14 MB a precision before compression.
    config.save_clocks = False
    return config

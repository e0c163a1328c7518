"""Generation of SmolLM2-135M on a CPU: float32, and quantized models as `prepare_for_inference` makes them.

Claim: a token of one text takes a quantized model no longer than the float32 model. One minute on two cores.

    python -m experiments.bench.cpu --config=configs/bench/cpu.py --workdir=runs/cpu
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory; read as float32.
    config.model = "smollm2"
    # Precisions of the decoder's linear layers; float32 is always measured too.
    config.precisions = "W8A8,W4A8g64"
    # Precision of the embedding and of the output layer; "" leaves them float32.
    config.embedding_precision = "W8A16"
    # Whether to measure each precision also with weights that stay packed.
    config.packed = True
    # Tokens of the prompt, which begins with CPython's help topics; and new tokens.
    config.prompt_tokens = 128
    config.new_tokens = 16
    # Interleaved runs of each model; medians are reported.
    config.rounds = 5
    return config

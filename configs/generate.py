"""Text from a prompt, greedily, by SmolLM2-135M in float32; about 15 tokens a second on 2 CPU cores.

    python -m experiments.generate --config=configs/generate.py --config.prompt="The capital of France is"

Any other model by --config.model, such as a packed checkpoint that experiments/quantize.py wrote.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file, a Hugging Face directory, a packed checkpoint.
    config.model = "smollm2"
    # Quantize the decoder's linear layers first, for example "W8A8"; "" takes the model as it is.
    config.precision = ""
    config.calibration = "minmax"
    # Read a packed checkpoint at no more than this many weight bits; 0 reads all.
    config.bits = 0
    config.prompt = "The capital of France is"
    config.max_new_tokens = 64
    # Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens.
    config.temperature = 0.0
    config.top_k = 0
    config.top_p = 1.0
    config.seed = 0
    return config

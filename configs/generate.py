"""Greedy text generation with SmolLM2-135M in float32; about 15 tokens per second on 2 CPU cores.

    python -m experiments.generate --config=configs/generate.py --config.prompt="The capital of France is"

For another model, such as a packed checkpoint of experiments/quantize.py, set --config.model.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file, a Hugging Face directory, or a packed checkpoint.
    config.model = "smollm2"
    # Precision to quantize the decoder's linear layers to, for example "W8A8"; "" leaves the model unchanged.
    config.precision = ""
    config.calibration = "minmax"
    # Most weight bits to read from a packed checkpoint; 0 reads all.
    config.bits = 0
    # A GGUF file, or a quantized Hugging Face directory, served at its own precision: bits of its activations, 16 for
    # float ones; 0 reads GGUF files as floats, and takes what directories state.
    config.activations = 0
    # Whether integers take the place of float scales of groups, see bj.nn.with_integer_groups; prints the errors.
    config.integer_groups = False
    # Dtype of what stays float: "" is bfloat16 on GPUs and the model's own on CPUs.
    config.dtype = ""
    config.prompt = "The capital of France is"
    # Whether the prompt is a user's message for the model's chat template, after a system message if there is one.
    config.chat = False
    config.system = ""
    config.max_new_tokens = 64
    # Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens.
    config.temperature = 0.0
    config.top_k = 0
    config.top_p = 1.0
    # Above 1, tokens that the text has become less likely; 1 changes nothing.
    config.repetition_penalty = 1.0
    # String that ends the text before it; "" is none.
    config.stop = ""
    # Bits of the cached keys and values, 8 or 4; 0 keeps floats.
    config.cache_bits = 0
    config.seed = 0
    # Devices that texts (data) and weights (model) of packed models are divided over.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    return config

"""SmolLM2-135M quantized to 1 to 8 weight bits, evaluated on CPython's help topics.

Claim: W8A8 stays within 3% of the unquantized perplexity, per channel and in groups of 64; below 4 bits
round-to-nearest collapses. About five minutes on 2 CPU cores.

    python -m experiments.quantize --config=configs/smollm2.py --workdir=runs/smollm2
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # "pydoc_topics" (CPython's help topics), "python_stdlib" (its source) or a UTF-8 file.
    config.text = "pydoc_topics"
    # Number of scored windows, and tokens per window.
    config.windows = 8
    config.window_length = 512
    # Precisions of the decoder's linear layers, comma separated; per channel, or gN for groups of N.
    config.precisions = "W8A8,W6A8,W4A8,W4A4,W2A8,W1A8,W8A8g64,W6A8g64,W4A8g64,W4A4g64,W2A8g64,W1A8g64"
    # A JSON file of rules that come before these, see configs/calibrate.py; "" for none.
    config.rules = ""
    # Precision of the embedding and of the output layer, whose input stays float.
    config.embedding_precision = "W8A16"
    # How the scales of weights are chosen: "minmax", "mse", "absmean" or "absmax"; "" is the best for each width.
    config.calibration = ""
    # Prompt of a greedy sample from every model, and its length; 0 tokens for none.
    config.prompt = "The capital of France is"
    config.sample_tokens = 12
    # Whether to write a packed checkpoint of every precision.
    config.checkpoints = True
    # Devices that texts (data) and weights (model) of packed models are divided over; float models run on one.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    return config

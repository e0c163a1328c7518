"""6144 texts of up to 512 tokens, sampled from SmolLM2-135M as training text for configs/smollm2_w2a8_finetune.py.

Claim: 2.5 million tokens in 80 seconds on one H100.

    python -m experiments.sample_text --config=configs/sample_text.py --workdir=runs/sample_text
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # Number of texts, rounded up to whole batches.
    config.texts = 6144
    config.batch_size = 1024
    # Most tokens per text; the model may end it earlier.
    config.length = 512
    # Prompt before the random first token of every text; not part of the written text.
    config.prefix = "<|endoftext|>"
    config.temperature = 1.0
    # 0 keeps all tokens.
    config.top_k = 0
    config.top_p = 0.95
    config.seed = 0
    # Devices that texts (data) and weights (model) of a packed model are divided over; a float model is whole on every
    # device, and all of them, data x model, divide the texts of a batch.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    return config

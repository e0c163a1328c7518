"""SmolLM2-135M writes 6144 texts of up to 512 tokens, for configs/smollm2_w2a8_finetune.py to learn from.

Claim: 2.5 million tokens of English in 80 seconds on one H100, with 30 GB of cache.

    python -m experiments.sample_text --config=configs/sample_text.py --workdir=runs/sample_text
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # At least so many texts: whole batches are written.
    config.texts = 6144
    config.batch_size = 1024
    # Tokens of a text at most; it ends sooner where the model ends it.
    config.length = 512
    # What every text begins with, before its random token; it is not written down.
    config.prefix = "<|endoftext|>"
    config.temperature = 1.0
    # 0 keeps all tokens.
    config.top_k = 0
    config.top_p = 0.95
    config.seed = 0
    return config

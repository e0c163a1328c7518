"""Seconds from `import bipolar_jax` to the first text of SmolLM2-135M, in fresh processes.

Claim: on an H200 at most 8 s with empty caches and 3 s with a kept one; Llama-3-8B (--config.model=llama-3-8b) at most
20 s. Two processes, a minute.

    python -m experiments.bench.first_call --config=configs/bench/first_call.py --workdir=runs/first_call
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Presets, comma separated; their weights are random.
    config.models = "smollm2-135m"
    # Precisions of the packed layers, comma separated.
    config.precisions = "W4A8"
    # Tokens of the prompt, and of the text.
    config.prompt_tokens, config.new_tokens = 64, 16
    # Layers of the model; 0 is all of them.
    config.layers = 0
    # Seconds that one process may take.
    config.limit = 240
    return config

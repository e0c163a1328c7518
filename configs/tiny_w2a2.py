"""The model of tiny_bf16.py with 2-bit weights and activations in every layer of the decoder; embeddings stay float.

Expected, not yet measured: a validation loss some 0.3 to 0.6 nats above that of tiny_bf16.py; two to three minutes on
one H200.

    python -m experiments.train --config=configs/tiny_w2a2.py --workdir=runs/tiny_w2a2
"""

from ml_collections import ConfigDict

from configs.tiny_base import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config("tiny_w2a2")
    config.rules = (("^layers/", "W2A2"),)
    config.optimizer.learning_rate = 2e-3  # straight-through gradients of few bits bear, and want, larger steps
    return config

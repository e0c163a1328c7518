"""The model of tiny_bf16.py with 1-bit weights and 1-bit activations in every layer of the decoder.

Weight scales are learned (LSQ, arXiv 1902.08153). Activations are clipped at their token's mean magnitude, which
becomes the 1-bit scale (XNOR-Net, arXiv 1603.05279); clipped activations get no gradient.

Claim: a final validation loss of 1.80, 0.20 nats above that of tiny_bf16.py and 0.28 above its least, and still
falling; seven minutes beside two other runs on one H100. With --config.optimizer.weight_decay=0.1 and
--config.optimizer.step_size_rate=0.05 it was 1.94.

    python -m experiments.train --config=configs/tiny_w1a1.py --workdir=runs/tiny_w1a1
"""

from ml_collections import ConfigDict

from .tiny_base import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config("tiny_w1a1")
    config.rules = (("^layers/", "W1A1"),)
    config.quantization.calibration = "absmean"
    config.quantization.learned_steps = True
    config.quantization.clip_activations = 1.0
    config.optimizer.learning_rate = 8e-3
    config.optimizer.weight_decay = 0.3
    config.optimizer.step_size_rate = 0.2
    return config

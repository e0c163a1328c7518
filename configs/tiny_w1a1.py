"""The model of tiny_bf16.py with binary weights and binary activations in every layer of the decoder.

Scales of weights are learned (LSQ, arXiv 1902.08153): as small a model as that of tiny_base.py's remarks had a loss of
4.45 so, and 4.57 with centered weights and their mean magnitude for a scale (BitNet, arXiv 2310.11453). The decay falls
away: it would move latent weights towards the sign's jump. Activations are clipped at their token's mean magnitude,
which becomes the scale of one bit (XNOR-Net, arXiv 1603.05279); beyond it they get no gradient.

Expected, not yet measured: a validation loss 0.5 to 0.9 nats above that of tiny_bf16.py (0.78 on a smaller model after
800 steps of 1024 tokens); two to three minutes on one H200.

    python -m experiments.train --config=configs/tiny_w1a1.py --workdir=runs/tiny_w1a1
"""

from ml_collections import ConfigDict

from configs.tiny_base import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config("tiny_w1a1")
    config.rules = (("^layers/", "W1A1"),)
    config.quantization.calibration = "absmean"
    config.quantization.learned_steps = True
    config.quantization.clip_activations = 1.0
    config.optimizer.weight_decay = 0.0
    return config

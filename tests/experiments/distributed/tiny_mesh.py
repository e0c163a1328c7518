"""A tiny training config for meshes, as a file that `--config` takes; the text is that of TINY_TEXT."""

import os

from tests.support.tiny_training import whole_config


def get_config():
    config = whole_config(os.environ["TINY_TEXT"])
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim, config.model.ffn_size, config.model.num_layers = 32, 128, 1
    config.dtype, config.rules = "float32", (("^layers/", "W4A8g32"),)
    config.quantization.calibration = "minmax"
    config.steps, config.log_every, config.evaluate_every, config.checkpoint_every = 40, 1, 1000, 5
    return config

"""A Llama of 6 million parameters in bfloat16, on the source of Python's standard library: the low-bit runs' measure.

Expected, not yet measured: validation perplexity of about 8 to 12 in 2000 steps of 16384 tokens (10 epochs), a
minute or two on one H200.

    python -m experiments.train --config=configs/tiny_bf16.py --workdir=runs/tiny_bf16
"""

from ml_collections import ConfigDict

from configs.tiny_base import tiny_config


def get_config() -> ConfigDict:
    return tiny_config("tiny_bf16")

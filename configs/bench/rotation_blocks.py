"""Sizes of R4's blocks on SmolLM2-135M: what rounding to nearest leaves in the outputs of down.

Claim, on 2 windows of wikitext2's validation text: with activations of 8 bits blocks from 32 on are within 1.5% of one
block of 1536 = 12 x 128, whose squared error is 10 to 20% below that without a rotation. With 4 bits blocks of 256 have
6% more, of 128 15%, of 64 27%, of 32 46%; no rotation has 4.8 times as much. Five minutes of two busy cores.

    python -m experiments.bench.rotation_blocks --config=configs/bench/rotation_blocks.py --workdir=DIR \\
        --config.text=wikitext2_valid.txt
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # Text whose tokens are rounded: as of configs/calibrate.py; windows that run at once, and tokens of each.
    config.text = "pydoc_topics"
    config.windows = 2
    config.window_length = 512
    # Precisions of down, and sizes of blocks; the first is what the others are compared with. 0 is the largest.
    config.precisions = "W4A8g64,W4A8,W4A4g64,W3A8g64"
    config.blocks = "0,none,32,64,128,256,512"
    return config

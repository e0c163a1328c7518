"""SmolLM2-135M at 4 bits and fewer, the layers of each block learning together, on one H200: 2 minutes for four.

Claim: perplexity on 20 windows of wikitext2's validation text, float 20.2, one draw of text: W4A8 21.9, W4A8g64 21.6,
W4A16g64 21.3, W3A8g64 26.1, W4A4g64 28.4, W2A8g64 54.1, W1A8g64 510.

    python -m experiments.side_by_side --config=configs/side_by_side/smollm2_calibrated.py --workdir=runs/calibrated
"""

from ml_collections import ConfigDict

from . import llama3_groups

# Files of the folder that the program is started in.
_TEXT = "wikitext2_valid.txt"
_PRECISIONS = "W3A8g64,W4A4g64,W2A8g64,W1A8g64,W4A16g64,W4A8g64,W4A8"
_COMMAND = (
    f"calibrate --config=configs/calibrate.py --config.text={_TEXT} --config.windows_per_step=16 "
    "--config.sample_tokens=0 --config.reconstruction.epochs=8 --config.precisions="
)


def get_config() -> ConfigDict:
    config = llama3_groups.get_config()
    config.chains = ConfigDict({each: _COMMAND + each for each in _PRECISIONS.split(",")}, sort_keys=False)
    config.at_once = 4
    return config

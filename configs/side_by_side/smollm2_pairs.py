"""Methods of compression on the same draws of text, SmolLM2-135M, on one H200.

Five draws each: integer against float scales of groups, and against qwix; one file of 8 bits read at fewer, against a
calibration of each; caches of 8 and 4 bits. Three draws: such a file that serves 4 bits better, blocks that learn, and
another style of text, CPython's help topics. Of the first four, and of the two before those that learn, at once, four
took 4 to 6 minutes. Blocks that learn slow each other, and all others: eight chains at once, six of them such, did not
end in six minutes. qwix's GPTQ is left out: its loop over columns, outside of jit, takes more than 7 minutes a draw.

Claim: float groups at W4A8g64 are 0.15% (0.64) worse than integer ones, five draws. A file of 8 bits grows by 0.2% read
at 8, 1.0% at 6 (five draws), and 20% at 4 (four draws), where a calibration for 4 bits grows by 12.8%. See
experiments/results/CALIBRATION.md, Methods on the same draws of text.

    python -m experiments.side_by_side --config=configs/side_by_side/smollm2_pairs.py --workdir=runs/pairs
"""

from ml_collections import ConfigDict

from . import llama3_groups

# A file of the folder that the program is started in.
_WIKITEXT = "wikitext2_valid.txt"
_COMMAND = (
    "compare_methods --config=configs/compression/compare_methods.py --config.windows_per_step=16 "
    "--config.text={text} --config.seeds={seeds} --config.precisions={precisions} --config.compared={compared}"
)
_FIVE, _THREE = "0,1,2,3,4", "0,1,2"
# Text, draws, precisions and methods of each chain.
_CHAINS = {
    "groups": (_WIKITEXT, _FIVE, "W4A8g64", "descent,float_groups,qwix_ptq,qwix_awq"),
    "eight_bits": (_WIKITEXT, _FIVE, "W8A8", "descent,planes_of_8,qwix_ptq,qwix_awq"),
    "six_bits": (_WIKITEXT, _FIVE, "W6A8", "descent,planes_of_8,qwix_ptq,qwix_awq"),
    "cache": (_WIKITEXT, _FIVE, "W4A8", "descent,cache_8,cache_4,planes_of_8"),
    "even_planes": (_WIKITEXT, _THREE, "W4A8,W6A8,W8A8", "descent,planes_of_8_even"),
    "three_bits": (_WIKITEXT, _FIVE, "W3A8g64", "descent,qwix_ptq,qwix_awq"),
    "help_topics": ("pydoc_topics", _THREE, "W4A8g64,W4A8,W3A8g64", "rounding,descent"),
}
_LEARNED = "W3A8g64,W2A8g64,W4A4g64,W4A8g64,W4A8,W4A16g64"


def get_config() -> ConfigDict:
    config = llama3_groups.get_config()
    config.chains = ConfigDict(sort_keys=False)
    for name, (text, seeds, precisions, compared) in _CHAINS.items():
        config.chains[name] = _COMMAND.format(text=text, seeds=seeds, precisions=precisions, compared=compared)
    for precision in _LEARNED.split(","):
        command = _COMMAND.format(text=_WIKITEXT, seeds=_THREE, precisions=precision, compared="reconstruction")
        config.chains[f"learned_{precision}"] = f"{command} --config.against=reconstruction"
    return config

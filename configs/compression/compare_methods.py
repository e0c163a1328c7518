"""Methods of compression on the same draws of calibration text, against one of them: means with standard errors.

    python -m experiments.compare_methods --config=configs/compression/compare_methods.py --workdir=runs/methods \\
        --config.precisions=W4A8g64,W4A8 --config.seeds=0,1,2,3,4 --config.text=wikitext2_valid.txt

Against qwix, whose groups have float scales (pip install 'bipolar_jax[peers]'):

    ... --config.precisions=W4A16g64,W4A8g64 --config.compared=descent,float_groups,qwix_ptq,qwix_gptq,qwix_awq

Blocks that learn together, at rates and for targets of their own:

    ... --config.precisions=W2A8g64,W4A4g64 --config.compared=descent,reconstruction,reconstruction_slow

One checkpoint of 8 bits read at fewer, against a calibration for each; caches of 8 and 4 bits:

    ... --config.precisions=W8A8,W6A8,W4A8 --config.compared=descent,planes_of_8
    ... --config.precisions=W4A8 --config.compared=descent,cache_8,cache_4
"""

from ml_collections import ConfigDict

from . import calibrate


def get_config() -> ConfigDict:
    """Fields of configs/calibrate.py, which every method starts from, and what the methods change."""
    config = calibrate.get_config()
    config.reconstruction.epochs = 0  # methods say which blocks learn
    # Seeds of the draws: each has its own calibration text, and its own signs of the rotation.
    config.seeds = "0,1,2"
    # Methods that are compared, comma separated names of `methods`; "rounding" is to the nearest and has no draws.
    config.compared = "rounding,gptq,descent,foldable"
    # The one that all others are compared with.
    config.against = "descent"
    # What each method changes in the config; "suffix" is added to precisions: "f" asks for float scales of groups;
    # "peer" is a method of qwix.
    config.methods = ConfigDict(
        {
            "gptq": {"rounding": {"descent_passes": 0}},
            "descent": {},
            "nearest": {"rounding": {"algorithm": "nearest"}},
            "unrotated": {"rotation": "none"},
            "foldable": {"rotation": "foldable"},
            "float_groups": {"suffix": "f"},
            "reconstruction": {"reconstruction": {"epochs": 8}},
            "reconstruction_of_model": {"reconstruction": {"epochs": 8, "target": "float_model"}},
            "reconstruction_slow": {"reconstruction": {"epochs": 8, "code_rate": 3e-3, "grid_rate": 1e-3}},
            "reconstruction_fast": {"reconstruction": {"epochs": 8, "code_rate": 3e-2, "grid_rate": 4e-3}},
            "reconstruction_long": {"reconstruction": {"epochs": 24}},
            "nested": {"rounding": {"nested": (6, 4)}},
            "planes_of_8": {"rounded_bits": 8, "rounding": {"nested": (6, 4)}},
            "planes_of_8_even": {"rounded_bits": 8, "rounding": {"nested": (6, 4), "nested_decay": 0.25}},
            "cache_8": {"cache_bits": 8},
            "cache_4": {"cache_bits": 4},
            "whole_spans": {"learn_spans": 0},
            "asymmetric": {"rounding": {"asymmetry": 0.25}},
            "damped": {"rounding": {"damping": 0.05}},
            "embedding_minmax": {"embedding_calibration": "minmax"},
            "qwix_ptq": {"peer": "ptq"},
            "qwix_gptq": {"peer": "gptq"},
            "qwix_awq": {"peer": "awq"},
        }
    )
    config.checkpoints = False
    config.sample_tokens = 0
    return config

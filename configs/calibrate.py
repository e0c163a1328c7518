"""SmolLM2-135M calibrated with text that it writes itself, evaluated on CPython's help topics.

Claim: with 12 windows W4A8g64 has 8.7% (paired standard error 0.7%) more perplexity than the float model, 22.00 against
20.25, and W4A8 per channel 16%, on 20 windows of wikitext2's validation text (measured with zero on the embedding's
grid). W4A8g64: about 6 minutes of CPU time. With all 128 windows 21.7 (+7.2%), which two cores write in 12 minutes and
calibrate with in 10, in 2.6 GB.

    python -m experiments.calibrate --config=configs/calibrate.py --workdir=runs/calibrated \\
        --config.calibration_windows=12 --config.text=wikitext2_valid.txt --config.precisions=W4A8g64,W4A8
"""

import dataclasses

from ml_collections import ConfigDict

from bipolar_jax.compress import Reconstruction, Rounding


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # Text that is scored: "pydoc_topics" (CPython's help topics), "python_stdlib" (its source) or a UTF-8 file.
    config.text = "pydoc_topics"
    # Number of scored windows, and tokens per window.
    config.windows = 20
    config.window_length = 512
    # Precisions of the decoder's linear layers, comma separated; per channel, or gN for groups of N.
    config.precisions = "W4A8,W4A8g64"
    # Precisions that are also rounded to nearest, as a comparison; "" for none.
    config.rounded = ""
    # Precision of the embedding and of the output layer, whose input stays float.
    config.embedding_precision = "W8A16"
    # How its scales are chosen; "" is the default of its bits. With "absmax" the largest number of each row, often of
    # one feature in all rows, stays exact; "embedding_minmax" of compare_methods has zero on the grid instead.
    config.embedding_calibration = "absmax"
    # A JSON file of rules that come before these: [["layers/0-3/ffn", "W8A8"], ["k_proj", null]]; "" for none. With
    # rules for all layers, such as those of experiments/allocate.py, leave precisions empty.
    config.rules = ""
    # Text that is calibrated with: "self" (the model writes it), or as `text`, or a .npy file of token ids.
    config.calibration_text = "self"
    # Windows that are calibrated with, tokens of each, and how many run at once.
    config.calibration_windows = 128
    config.calibration_length = 512
    config.windows_per_step = 4
    # "full", "foldable" (nothing is rotated at run time within blocks) or "none".
    config.rotation = "full"
    # Numbers that "full" mixes of the input of down, such as 64: kernels rotate powers of two up to 256 while they
    # quantize; 0 mixes as many as can be, by XLA where they are others; -1 as many as the decode step of all layers
    # rotates for nothing (bj.ops.decode_rotation_block: 16 for Llama-3-8B).
    config.rotation_block = 0
    # How weights are rounded, see bj.compress.Rounding.
    config.rounding = ConfigDict(dataclasses.asdict(Rounding()))
    # How the layers of a block then learn together what the float model's block puts out, see
    # bj.compress.Reconstruction; 0 epochs: they do not. -1 is what suits each precision (`Reconstruction.of`): with
    # weights of up to 3 or activations of up to 4 bits 8 forward and backward passes over all windows, a minute of an
    # H200 for SmolLM2, not timed for whole models on CPUs. Else 0, as with a cache of few bits, nested codes, experts;
    # on a GPU 8 pay at W4A8 too (21.9 instead of 22.7) and at W4A8g64 (21.6 instead of 22.0).
    config.reconstruction = ConfigDict(dataclasses.asdict(Reconstruction()) | {"epochs": -1})
    # Bits at which layers are rounded, such as 8 with rounding.nested=(6, 4): a row has the high planes that its
    # precision asks for, as one file serves several precisions; 0 rounds each precision for itself.
    config.rounded_bits = 0
    # Activations of at most so many bits are clipped to a part of each token's range, found on the text; 0: none are.
    config.learn_spans = 4
    # Bits of the cache of keys and values that the model will decode with, 8 or 4; 0: floats. Packed models are
    # scored with it, too.
    config.cache_bits = 0
    # Of the rotation, and of the text that the model writes.
    config.seed = 0
    # Prompt of a greedy sample from every model, and its length; 0 tokens for none.
    config.prompt = "The capital of France is"
    config.sample_tokens = 12
    # Whether to write a packed checkpoint of every precision.
    config.checkpoints = True
    # Devices that texts (data) and weights (model) of packed models are divided over; float models run on one.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    return config

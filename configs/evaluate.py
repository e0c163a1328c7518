"""A model against another one, on the same windows of CPython's help topics; add questions and tasks as you like.

python -m experiments.evaluate --config=configs/evaluate.py --config.model=PATH --workdir=runs/evaluate
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "smollm2" (from the package index), a GGUF file, a Hugging Face directory, or a packed checkpoint.
    config.model = "smollm2"
    # The model that it is compared with, likewise; "" for none.
    config.against = ""
    # Most weight bits to read from packed checkpoints; 0 reads all.
    config.bits = 0
    # A GGUF file, or a quantized Hugging Face directory, served at its own precision: bits of its activations, 16 for
    # float ones; 0 reads GGUF files as floats, and takes what directories state.
    config.activations = 0
    # The text is read by `model`, not by `against`, through a cache of keys and values of 8 or 4 bits; 0: of floats.
    config.cache_bits = 0
    # "pydoc_topics" (CPython's help topics), "python_stdlib" (its source) or a UTF-8 file; "" for no perplexity.
    config.text = "pydoc_topics"
    # Number of scored windows, tokens per window, and windows that run at once.
    config.windows = 20
    config.window_length = 512
    config.windows_per_step = 4
    # A JSONL file of {"question": text, "choices": [text, ...], "answer": index}; "" for none.
    config.questions = ""
    # Tasks of lm-evaluation-harness (pip install 'bipolar_jax[eval]'), comma separated, and how many documents of each;
    # 0 takes all.
    config.tasks = ""
    config.task_limit = 0
    # Devices that texts (data) and weights (model) of packed models are divided over; float models run on one.
    # With `cut_positions` those that share a head of keys cache a part of the positions each; with `cut_tokens` they
    # divide the tokens of long prompts between products.
    config.mesh = ConfigDict({"data": 1, "model": 1, "cut_positions": False, "cut_tokens": True})
    return config

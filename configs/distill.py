"""SmolLM2-135M at W4A8g64, distilled from its float self after experiments/calibrate; for a GPU.

python -m experiments.distill --config=configs/distill.py --config.packed=runs/calibrated/W4A8g64.safetensors \
    --workdir=runs/distilled
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # The float model: "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # The packed checkpoint that experiments/calibrate made of it, and the seed of that run, which rotated it.
    config.packed = ""
    config.rotation_seed = 0
    # Text to learn from: "self" (the float model writes it), or a .npy file of windows of token ids; number of windows,
    # tokens of each, and how many are written at once.
    config.distillation_text = "self"
    config.distillation_windows = 16384
    config.distillation_length = 512
    config.windows_per_step = 512
    # Updates; the learning rate of latent weights at its peak; updates of warm-up; times the learning rate is that of
    # scales, offsets and norms; windows of an update. More for fewer bits: 1200 steps at 1e-4 for W3A8g64, 3000 at 3e-4
    # for W2A8g64.
    config.steps = 600
    config.learning_rate = 2e-5
    config.warmup_steps = 50
    config.scale_rate = 0.1
    # Whether the integers of integer groups learn, too, or only the scale of each row.
    config.learn_groups = False
    config.clip_norm = 1.0
    config.batch_size = 16
    # Parts of an update's windows that run one after the other: more take less memory.
    config.parts = 1
    # Of the order of windows, and of the text that the model writes.
    config.seed = 0
    # Of the operands of products; "" is bfloat16 on GPUs and float32 on CPUs.
    config.dtype = ""
    # How often the mean loss is printed, and a checkpoint is written, in updates.
    config.log_every = 50
    config.checkpoint_every = 600
    # Text that is scored: "pydoc_topics" (CPython's help topics), "python_stdlib" (its source) or a UTF-8 file; number
    # of windows, and tokens per window.
    config.text = "pydoc_topics"
    config.windows = 20
    config.window_length = 512
    # Prompt of a greedy sample from every model, and its length; 0 tokens for none.
    config.prompt = "The capital of France is"
    config.sample_tokens = 12
    # Whether to write the packed checkpoint.
    config.checkpoints = True
    return config

"""SmolLM2-135M, distilled from its float self after experiments/calibrate, precision by precision; for a GPU.

Claim, on an H200, on 20 windows of wikitext2's validation text (float 20.2), one draw of text, at 61 to 64 ms a step:
W4A8g64 22.0 becomes 21.0 in 938 steps, W4A8 22.7 becomes 21.1 in 1318 (`experiments/results/nvidia_h200/
distill_long.json`, the steps of `compress.distillation.Schedule.of`), W3A8g64 28.1 becomes 23.9 in 888 of 1200, W2A8g64
80 becomes 34 in 2267 of 3000 (`distill.json`).
From blocks that learned together (`--config.reconstruction.epochs=8`) W3A8g64 26.1 becomes 23.0 in 1371 steps, W4A4g64
28.4 24.2 in 1565, W4A16g64 21.3 20.95 in 1070, W2A8g64 54.1 34.5 in 2167, W1A8g64 510 77 in 1718
(`distill_reconstructed.json`, `distill_reconstructed_few_bits.json`); with `--config.steps=5000` and 16384 windows of
text W2A8g64 54.1 becomes 32.1 (`distill_two_bits_5000_steps.json`).

    python -m experiments.calibrate --config=configs/calibrate.py --workdir=runs/calibrated \\
        --config.precisions=W4A8g64,W3A8g64
    python -m experiments.distill --config=configs/distill.py --workdir=runs/distilled \\
        --config.packed=runs/calibrated/W4A8g64.safetensors,runs/calibrated/W3A8g64.safetensors
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # The float model: "smollm2" (from the package index), a GGUF file or a Hugging Face directory.
    config.model = "smollm2"
    # The packed checkpoints that experiments/calibrate made of it, comma separated, one of each precision; and the seed
    # of that run, which rotated them.
    config.packed = ""
    config.rotation_seed = 0
    # Text to learn from: "self" (the float model writes it), or a .npy file of windows of token ids; number of windows,
    # tokens of each, and how many are written at once.
    config.distillation_text = "self"
    config.distillation_windows = 16384
    config.distillation_length = 512
    config.windows_per_step = 512
    # Updates, and the learning rate of latent weights at its peak; 0: those of each precision, from 300 at 1e-5 (5 bits
    # and more) to 3000 at 3e-4 (2 bits).
    config.steps = 0
    config.learning_rate = 0.0
    # Times the steps of each precision: with 4 and --config.seconds=600 ten minutes are used up where they have room
    # for more steps than those. The learning rate decays over all of them.
    config.steps_factor = 1.0
    # Seconds that the whole program may take, from its start: fewer steps where they do not suffice for all, in the
    # proportion that the precisions would have; 0 is no limit.
    config.seconds = 0.0
    # Updates of warm-up, at most a tenth of the steps; times the learning rate is that of scales, offsets
    # and norms.
    config.warmup_steps = 50
    config.scale_rate = 0.1
    # Most bits of weights whose integer groups learn their integers, too, and not only the scale of each row: up to 2
    # bits a step of these is 1 to 2%, small enough to learn; 0: none do.
    config.learn_groups_up_to = 2
    config.clip_norm = 1.0
    # Windows of an update.
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
    # Devices that divide the windows of an update, data x model of them; each has all weights. Distilled models are
    # scored with texts divided over `data` and weights over `model`, as experiments/calibrate does it.
    config.mesh = ConfigDict({"data": 1, "model": 1})
    # Whether to write the packed checkpoint.
    config.checkpoints = True
    return config

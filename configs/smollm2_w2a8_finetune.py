"""SmolLM2-135M fine-tuned to 2-bit weights and 8-bit activations, distilled from the float model on text it generated.

Without training the model collapses at W2A8 (configs/smollm2.py). Scales are learned in groups of 64. The loss is the
distillation loss alone (arXiv 1503.02531). In result.json `teacher` is the float model's perplexity on the validation
text, and the evaluation of step 0 that of the untrained W2A8 model.

Claim: with --config.validation_text set to wikitext2's validation text, a perplexity of 55.7 after 1500 steps of 8192
tokens, against 24.9 for the float model and 38155 for the best W2A8 without training (experiments/quantize.py,
W2A8g32f, "minmax"). Four minutes on one shared H100.

    python -m experiments.sample_text --config=configs/sample_text.py --workdir=runs/sample_text
    python -m experiments.train --config=configs/smollm2_w2a8_finetune.py --workdir=runs/smollm2_w2a8
"""

from ml_collections import ConfigDict

from .tiny_base import training_config


def get_config() -> ConfigDict:
    config = training_config("smollm2_w2a8_finetune")
    config.pretrained = "smollm2"
    config.distillation.teacher = "smollm2"
    config.distillation.weight = 1.0
    config.text = "runs/sample_text/text.txt"
    config.validation_text = "pydoc_topics"
    config.window_length = 512
    config.rules = (("^layers/", "W2A8g64f"),)
    config.quantization.learned_steps = True
    config.quantization.clip_gradient = True
    config.steps = 1500
    config.batch_size = 16
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 500
    config.evaluate_windows = 200
    config.evaluate_batch = 8
    config.checkpoint_every = 1500
    config.keep_checkpoints = 1
    config.prompt = "The capital of France is"
    config.sample_tokens = 24
    return config

"""SmolLM2-135M brought to 2-bit weights and 8-bit activations, by learning from its float self on texts that it wrote.

Rounded to W2A8 without training the model collapses (README.md). Scales are learned in groups of 64; the loss is the
distance to the float model's distribution alone (arXiv 1503.02531), of which the texts are samples. result.json has
the float model's perplexity as `teacher` and the collapsed one as the evaluation of step 0; both are of texts that are
never trained on, as are all texts that anybody else wrote.

Claim: after 1500 steps of 8192 tokens a perplexity of 55.7 on wikitext2's validation text (--config.validation_text),
on which the float model has 24.9, and W2A8 without training 38155 at the least (experiments/quantize.py in groups of
32, "minmax"); four minutes beside another program on one H100.

    python -m experiments.sample_text --config=configs/sample_text.py --workdir=runs/sample_text
    python -m experiments.train --config=configs/smollm2_w2a8_finetune.py --workdir=runs/smollm2_w2a8
"""

from ml_collections import ConfigDict

from configs.tiny_base import training_config


def get_config() -> ConfigDict:
    config = training_config("smollm2_w2a8_finetune")
    config.pretrained = "smollm2"
    config.distillation.teacher = "smollm2"
    config.distillation.weight = 1.0
    config.text = "runs/sample_text/text.txt"
    config.validation_text = "pydoc_topics"
    config.window_length = 512
    config.rules = (("^layers/", "W2A8g64"),)
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

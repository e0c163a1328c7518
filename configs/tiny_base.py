"""What the configs of training share: every field of experiments/train.py, and a model of a few million parameters.

The configs beside it make claims; this one makes none and is not run by itself.
"""

from ml_collections import ConfigDict


def training_config(name: str) -> ConfigDict:
    """All fields, without a model."""
    config = ConfigDict()
    config.name = name
    # Start from "smollm2" (the package index), a GGUF file or a Hugging Face directory; "" starts from random weights.
    config.pretrained = ""
    # Fields of TransformerConfig but vocab_size, for models that start from random weights.
    config.model = ConfigDict()
    # Random weights are multiplied by these first: the embedding's, and those of the layers that add to the residual
    # stream (o_proj and down_proj). Rounded layers say more than float ones to begin with, and drown the embedding.
    config.initial_embedding = 1.0
    config.initial_residual = 1.0
    # What layers compute in, "bfloat16" or "float32"; parameters are float32.
    config.dtype = "bfloat16"
    config.seed = 0

    # Texts joined by commas: "python_stdlib" (source of CPython's standard library), "pydoc_topics" (its help topics),
    # UTF-8 files. Or one .npy file of token ids.
    config.text = "python_stdlib"
    # What to evaluate on, named likewise; "" keeps a part of the text for that.
    config.validation_text = ""
    # A tokenizer.json; "" takes the pretrained model's, or trains one of vocab_size tokens.
    config.tokenizer = ""
    config.vocab_size = 4096
    config.window_length = 256
    # One of so many blocks of the text (8192 characters, or a window of token ids) is never trained on; unused where
    # validation_text names another text.
    config.validation_every = 20

    # (pattern, precisions) pairs over layer paths, the first that matches decides, () for a float model. Precisions
    # are one ("W2A8", "W1.58A8g64") or begin at steps: "0:float,500:W4A8,1000:W2A8".
    config.rules = ()
    config.quantization = ConfigDict()
    # How weight scales are chosen: "mse", "absmax", "minmax", or "absmean" for 1 bit and ternary; or learned (LSQ).
    config.quantization.calibration = "mse"
    config.quantization.learned_steps = False
    # "center", "standardize" or "" for none.
    config.quantization.weight_norm = ""
    # No gradient for weights beyond the grid.
    config.quantization.clip_gradient = False
    # Bounds activations by so many times their token's mean magnitude before they are quantized; 0 does not.
    config.quantization.clip_activations = 0.0
    # 2 to 8: stochastic rounding of what comes from above in the backward pass; 0 for none.
    config.quantization.gradient_bits = 0

    config.distillation = ConfigDict()
    # A float model of the same vocabulary, named as `pretrained` is; "" for none.
    config.distillation.teacher = ""
    # Its part of the loss; cross entropy has the rest.
    config.distillation.weight = 0.5
    config.distillation.temperature = 1.0

    config.steps = 2000
    config.batch_size = 64
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    # Of the learning rate, at the end of the cosine.
    config.optimizer.final_fraction = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_embeddings = False
    # Of the learning rate, for learned step sizes: Adam's updates are as large as the learning rate, however small the
    # gradient, and step sizes are a hundredth or less.
    config.optimizer.step_size_rate = 1.0
    config.optimizer.clip_norm = 1.0

    # Metrics are fetched every so many steps, and written for each of them.
    config.log_every = 20
    config.evaluate_every = 250
    # Of the validation windows, the first so many; 0 for all.
    config.evaluate_windows = 256
    config.evaluate_batch = 32
    config.checkpoint_every = 500
    config.keep_checkpoints = 2
    # Train on while a checkpoint is written.
    config.asynchronous = True
    # What the packed model is to continue at the end; 0 tokens for nothing.
    config.prompt = "def "
    config.sample_tokens = 64
    return config


def tiny_config(name: str) -> ConfigDict:
    """A Llama of 6 layers, 384 wide: 12 million parameters, of which 1.6 million are the embedding."""
    config = training_config(name)
    config.model.hidden_size = 384
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.num_kv_heads = 6
    config.model.head_dim = 64
    config.model.ffn_size = 1024
    config.model.context_length = 512
    config.model.tie_embeddings = True
    config.model.norm = "rms"
    config.model.qkv_bias = False
    config.model.linear_bias = False
    # On a model of 0.8 million parameters, after 250 steps of 1024 tokens on a CPU, W2A2 had a validation loss of 4.74
    # with these factors of the first weights and of 5.5 to 5.6 without (at other learning rates, or clipped); bf16 had
    # 3.94, and 4.36 without (after 300 steps, at half the learning rate).
    # On a model 256 wide, 2000 steps, an H100: bf16 1.85 at this rate, 1.99 at half of it and 2.06 at a quarter.
    config.optimizer.learning_rate = 4e-3
    config.steps = 6000
    config.evaluate_every = 500
    config.checkpoint_every = 2000
    config.initial_embedding = 4.0
    config.initial_residual = 0.35
    return config

"""Shared by the training configs: every field of experiments/train.py, and a Llama of 12 million parameters.

Not a config itself: it has no get_config().
"""

from ml_collections import ConfigDict


def training_config(name: str) -> ConfigDict:
    """Every field with its default; `model` is empty."""
    config = ConfigDict()
    config.name = name
    # Initial model: "smollm2" (from the package index), a GGUF file or a Hugging Face directory; "" for random weights.
    config.pretrained = ""
    # Fields of TransformerConfig except vocab_size, for random initial weights.
    config.model = ConfigDict()
    # Factors on the random initial weights of the embedding and of the layers that add to the residual stream (o_proj
    # and down_proj). Quantized layers have larger initial outputs than float ones, which would dominate the embedding.
    config.initial_embedding = 1.0
    config.initial_residual = 1.0
    # Dtype of the computation, "bfloat16" or "float32"; parameters are float32.
    config.dtype = "bfloat16"
    config.seed = 0

    # Training text: "python_stdlib" (source of CPython's standard library), "pydoc_topics" (its help topics), UTF-8
    # files, or several of these, comma separated. Or one .npy file of token ids.
    config.text = "python_stdlib"
    # Validation text, in the same notation; "" holds out a share of the training text.
    config.validation_text = ""
    # A tokenizer.json; "" uses the pretrained model's, or trains one with vocab_size tokens.
    config.tokenizer = ""
    config.vocab_size = 4096
    config.window_length = 256
    # One in this many blocks of the text (8192 characters, or a window of token ids) is held out for validation;
    # unused with validation_text.
    config.validation_every = 20

    # (pattern, precision) pairs over layer paths; the first match decides; () for a float model. A precision is fixed
    # ("W2A8", "W1.58A8g64") or a schedule by first step ("0:float,500:W4A8,1000:W2A8").
    config.rules = ()
    config.quantization = ConfigDict()
    # Calibration of weight scales: "mse", "absmax", "minmax", or "absmean" (1 bit and ternary). Only the initial value
    # with learned_steps, which trains the scales (LSQ).
    config.quantization.calibration = "mse"
    config.quantization.learned_steps = False
    # Normalization of weights: "center", "standardize" or "" for none.
    config.quantization.weight_norm = ""
    # Whether weights outside the grid get no gradient.
    config.quantization.clip_gradient = False
    # Clips activations at this multiple of their token's mean magnitude before they are quantized; 0 for no clipping.
    config.quantization.clip_activations = 0.0
    # Bits (2 to 8) of stochastically rounded output gradients in the backward pass; 0 for none.
    config.quantization.gradient_bits = 0

    config.distillation = ConfigDict()
    # A float model with the same vocabulary, in the notation of `pretrained`; "" for none.
    config.distillation.teacher = ""
    # Weight of the distillation loss; cross entropy has weight 1 - weight.
    config.distillation.weight = 0.5
    config.distillation.temperature = 1.0

    # Devices that windows (data) and weights (model) are divided over.
    config.mesh = ConfigDict({"data": 1, "model": 1})
    config.steps = 2000
    config.batch_size = 64
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    # Final learning rate as a fraction of the peak.
    config.optimizer.final_fraction = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_embeddings = False
    # Factor on the updates of learned step sizes. Adam's updates have the size of the learning rate, which is large
    # compared with a step size.
    config.optimizer.step_size_rate = 1.0
    config.optimizer.clip_norm = 1.0

    # Steps between fetching metrics, which are logged for every step.
    config.log_every = 20
    config.evaluate_every = 250
    # Number of validation windows to use; 0 for all.
    config.evaluate_windows = 256
    config.evaluate_batch = 32
    config.checkpoint_every = 500
    config.keep_checkpoints = 2
    # Whether to write checkpoints in the background.
    config.asynchronous = True
    # Prompt of a greedy sample from the packed model at the end, and its length; 0 tokens for none.
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
    # Half and a quarter of this rate gave bf16 higher losses, on a model with hidden_size=256 after 2000 steps
    # (experiments/results/nvidia_h100/train_tiny_others.json).
    config.optimizer.learning_rate = 4e-3
    config.steps = 6000
    config.evaluate_every = 500
    config.checkpoint_every = 2000
    config.initial_embedding = 4.0
    config.initial_residual = 0.35
    return config

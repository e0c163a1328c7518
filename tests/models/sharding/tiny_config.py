"""The model that tests of cuts share: two heads of keys and values."""

from bipolar_jax.models import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=128,
    context_length=64,
)

"""Tiny random OPT and BLOOM checkpoints as Hugging Face directories; every bias and norm is random too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.support.tiny_checkpoints import make_tokenizer

HEAD_DIM, LAYERS, CONTEXT = 8, 3, 24
VOCAB = make_tokenizer("smollm").get_vocab_size() + 5  # tables have more rows than the tokenizer has ids


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """config.json, and float32 weights by Hugging Face name, in Hugging Face orientation."""

    config: dict
    weights: dict[str, np.ndarray]

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        make_tokenizer("smollm").save(str(directory / "tokenizer.json"))
        safetensors.numpy.save_file(self.weights, directory / "model.safetensors")
        return directory


class _Random:
    """Draws weights under their names."""

    def __init__(self, prefix: str):
        self._rng, self._prefix = np.random.default_rng(0), prefix
        self.weights: dict[str, np.ndarray] = {}

    def table(self, name: str, rows: int, width: int) -> None:
        self._add(f"{name}.weight", self._rng.standard_normal((rows, width)))

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self._add(f"{name}.weight", inputs**-0.5 * self._rng.standard_normal((outputs, inputs)))
        self._add(f"{name}.bias", 0.3 * self._rng.standard_normal(outputs))

    def norm(self, name: str, width: int) -> None:
        self._add(f"{name}.weight", 1 + 0.3 * self._rng.standard_normal(width))
        self._add(f"{name}.bias", 0.3 * self._rng.standard_normal(width))

    def _add(self, name: str, array: np.ndarray) -> None:
        self.weights[self._prefix + name] = array.astype(np.float32)


def make_opt(heads: int = 4, prefix: str = "model.", **config) -> Checkpoint:
    """OPT; the feed-forward block is not four times as wide, so that the config must be read."""
    hidden, ffn = heads * HEAD_DIM, 5 * heads * HEAD_DIM // 2
    random = _Random(prefix)
    random.table("decoder.embed_tokens", VOCAB, hidden)
    random.table("decoder.embed_positions", CONTEXT + 2, hidden)
    random.norm("decoder.final_layer_norm", hidden)
    for layer in range(LAYERS):
        name = f"decoder.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            random.linear(f"{name}self_attn.{projection}", hidden, hidden)
        random.norm(f"{name}self_attn_layer_norm", hidden)
        random.linear(f"{name}fc1", hidden, ffn)
        random.linear(f"{name}fc2", ffn, hidden)
        random.norm(f"{name}final_layer_norm", hidden)
    fields = {
        "model_type": "opt",
        "activation_function": "relu",
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "eos_token_id": 2,
        "ffn_dim": ffn,
        "hidden_size": hidden,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": heads,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "word_embed_proj_dim": hidden,
    }
    return Checkpoint(fields | config, random.weights)


def make_bloom(heads: int = 4, prefix: str = "", **config) -> Checkpoint:
    """BLOOM, named as in the published files."""
    hidden = heads * HEAD_DIM
    random = _Random(prefix)
    random.table("word_embeddings", VOCAB, hidden)
    random.norm("word_embeddings_layernorm", hidden)
    random.norm("ln_f", hidden)
    for layer in range(LAYERS):
        name = f"h.{layer}."
        random.norm(f"{name}input_layernorm", hidden)
        random.linear(f"{name}self_attention.query_key_value", hidden, 3 * hidden)
        random.linear(f"{name}self_attention.dense", hidden, hidden)
        random.norm(f"{name}post_attention_layernorm", hidden)
        random.linear(f"{name}mlp.dense_h_to_4h", hidden, 4 * hidden)
        random.linear(f"{name}mlp.dense_4h_to_h", 4 * hidden, hidden)
    fields = {
        "model_type": "bloom",
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_epsilon": 1e-3,
        "n_embed": hidden,
        "n_layer": LAYERS,
        "num_attention_heads": heads,
        "offset_alibi": 100,
        "seq_length": CONTEXT,
        "vocab_size": VOCAB,
    }
    return Checkpoint(fields | config, random.weights)

"""Makes golden.json and logits.npz: what transformers computes for tiny checkpoints of every supported architecture.

    python -m tests.models.loaders.golden.make [NAME ...]

makes those of the names given, and keeps all others as they are stored; without names it makes all. Run with torch 2.13
and transformers 5.24, on a CPU, in an environment of its own: tests need neither. Prints the bytes of both files. Every
config is written as transformers 4 wrote it, and once more as transformers 5 writes it; both must give the same logits,
in float32 and with every weight in its place.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.models.loaders.golden.checkpoints import FOLDER, make_ids, make_weights, read, write

YARN = {"factor": 4.0, "original_max_position_embeddings": 4096, "type": "yarn"}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}


def llama(hidden: int, heads: int, ffn: int, vocab: int, model_type: str = "llama", **fields) -> dict[str, Any]:
    """config.json of a model with RoPE, as transformers 4 wrote it."""
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "vocab_size": vocab,
        **fields,
    }


def opt(hidden: int, heads: int, ffn: int, vocab: int, **fields) -> dict[str, Any]:
    return {
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "eos_token_id": 2,
        "ffn_dim": ffn,
        "hidden_size": hidden,
        "max_position_embeddings": 32,
        "model_type": "opt",
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "torch_dtype": "float16",
        "vocab_size": vocab,
        "word_embed_proj_dim": hidden,
        **fields,
    }


def bloom(vocab: int, **fields) -> dict[str, Any]:
    return {
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "model_type": "bloom",
        "n_layer": 2,
        "seq_length": 32,
        "vocab_size": vocab,
        **fields,
    }


def gemma(model_type: str, hidden: int, heads: int, ffn: int, vocab: int, **fields) -> dict[str, Any]:
    config = llama(hidden, heads, ffn, vocab, model_type, rms_norm_eps=1e-6, bos_token_id=2, eos_token_id=1)
    activation = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0}
    return config | activation | {"attention_bias": False, **fields}


def phi3(hidden: int, heads: int, ffn: int, vocab: int, **fields) -> dict[str, Any]:
    dropout = {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return llama(hidden, heads, ffn, vocab, "phi3", attention_bias=False, pad_token_id=0, **dropout, **fields)


def longrope(count: int) -> dict[str, Any]:
    """Factors for `count` frequencies."""
    short, long = ([round(first + 0.25 * i, 3) for i in range(count)] for first in (1.0, 2.0))
    return {"short_factor": short, "long_factor": long, "type": "longrope"}


QWEN3 = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 2, "attention_bias": False}
QWEN2 = {"rope_theta": 1e6, "sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}
QWEN3_MOE = QWEN3 | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
MIXTRAL = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama 1": llama(30, 3, 41, 67, rms_norm_eps=1e-6, tie_word_embeddings=False),
    "llama 2": llama(
        32,
        4,
        48,
        64,
        num_key_value_heads=4,
        rms_norm_eps=0.01,
        pretraining_tp=1,
        rope_scaling=None,
        attention_bias=False,
    ),
    "llama 2, linear": llama(40, 4, 36, 67, rope_theta=10000.0, rope_scaling={"factor": 4.0, "type": "linear"}),
    "llama 2, yarn": llama(36, 3, 40, 67, num_key_value_heads=1, rope_theta=10000.0, rope_scaling=YARN),
    "llama 3": llama(48, 6, 56, 67, num_key_value_heads=2, rope_theta=500000.0, mlp_bias=False),
    "llama 3.1": llama(64, 8, 80, 64, num_key_value_heads=2, rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama 3.2": llama(
        36,
        3,
        50,
        67,
        num_key_value_heads=1,
        head_dim=14,
        rope_theta=500000.0,
        rope_scaling=LLAMA3 | {"factor": 32.0},
        tie_word_embeddings=True,
    ),
    "llama, tied, with another head": llama(32, 4, 40, 48, tie_word_embeddings=True),
    "smollm2 135m": llama(
        54, 9, 72, 67, num_key_value_heads=3, rope_theta=100000, rope_interleaved=False, tie_word_embeddings=True
    ),
    "smollm2 1.7b": llama(32, 4, 64, 64, num_key_value_heads=4, rope_theta=130000, tie_word_embeddings=True),
    "mistral 0.3": llama(32, 4, 56, 64, "mistral", num_key_value_heads=2, rope_theta=1e6, sliding_window=None),
    "mistral nemo": llama(
        42, 3, 56, 67, "mistral", num_key_value_heads=1, head_dim=10, rope_theta=1e6, sliding_window=None
    ),
    "mistral, window of the context": llama(36, 6, 40, 67, "mistral", num_key_value_heads=3, sliding_window=32),
    "mistral, default window": llama(48, 8, 40, 48, "mistral"),
    "qwen2 0.5b": llama(28, 7, 50, 67, "qwen2", num_key_value_heads=1, tie_word_embeddings=True, **QWEN2),
    "qwen2 7b": llama(32, 4, 56, 64, "qwen2", num_key_value_heads=2, tie_word_embeddings=False, **QWEN2),
    "qwen2.5, yarn": llama(36, 6, 40, 67, "qwen2", num_key_value_heads=2, rope_scaling=YARN, **QWEN2),
    "qwen2.5, window of no layer": llama(
        32, 4, 40, 48, "qwen2", num_key_value_heads=4, **QWEN2 | {"use_sliding_window": True, "max_window_layers": 2}
    ),
    "mistral 0.1, a window": llama(32, 4, 40, 67, "mistral", num_key_value_heads=2, sliding_window=5),
    "qwen2, windows from layer 1": llama(
        32, 4, 40, 48, "qwen2", num_key_value_heads=2, **QWEN2 | {"use_sliding_window": True, "sliding_window": 5}
    ),
    "qwen3 0.6b": llama(
        32, 4, 56, 64, "qwen3", num_key_value_heads=2, head_dim=12, rope_theta=1e6, tie_word_embeddings=True, **QWEN3
    ),
    "qwen3 8b, yarn": llama(
        36,
        4,
        40,
        67,
        "qwen3",
        num_key_value_heads=1,
        head_dim=10,
        rope_theta=1e6,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        tie_word_embeddings=False,
        **QWEN3,
    ),
    "mixtral 8x7b": llama(
        32, 4, 40, 64, "mixtral", num_key_value_heads=2, rope_theta=1e6, sliding_window=None, **MIXTRAL
    ),
    "mixtral, a window": llama(
        36, 3, 24, 67, "mixtral", num_key_value_heads=1, sliding_window=5, **MIXTRAL | {"num_local_experts": 3}
    ),
    "qwen3 30b a3b": llama(
        32,
        4,
        56,
        64,
        "qwen3_moe",
        num_key_value_heads=2,
        head_dim=12,
        rope_theta=1e6,
        tie_word_embeddings=False,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **QWEN3_MOE,
    ),
    "qwen3 moe, dense layers": llama(
        32,
        4,
        40,
        67,
        "qwen3_moe",
        num_key_value_heads=1,
        head_dim=10,
        rope_theta=1e6,
        tie_word_embeddings=True,
        num_hidden_layers=4,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **QWEN3_MOE,
    ),
    "gemma 2": gemma(
        "gemma2",
        32,
        4,
        40,
        64,
        num_key_value_heads=2,
        head_dim=12,
        num_hidden_layers=3,
        sliding_window=5,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=8.0,
    ),
    "gemma 2, a window of the context": gemma(
        "gemma2", 36, 4, 40, 67, num_key_value_heads=1, head_dim=10, sliding_window=32, tie_word_embeddings=False
    ),
    "gemma 3 1b": gemma(
        "gemma3_text",
        32,
        4,
        40,
        64,
        num_key_value_heads=1,
        head_dim=12,
        num_hidden_layers=4,
        sliding_window=5,
        sliding_window_pattern=3,
        query_pre_attn_scalar=20,
        rope_theta=1e4,
        rope_local_base_freq=100.0,
        rope_scaling=None,
    ),
    "gemma 3 4b": gemma(
        "gemma3_text",
        36,
        4,
        40,
        67,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=4,
        query_pre_attn_scalar=10,
        layer_types=["full_attention", "sliding_attention"],
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "phi 3 mini 4k": phi3(32, 4, 40, 64, num_key_value_heads=4, sliding_window=7, rope_scaling=None),
    "phi 3 mini 128k": phi3(
        36,
        3,
        40,
        67,
        num_key_value_heads=3,
        sliding_window=32,
        original_max_position_embeddings=8,
        rope_scaling=longrope(6),
    ),
    "phi 4 mini": phi3(
        32,
        4,
        40,
        64,
        num_key_value_heads=2,
        original_max_position_embeddings=16,
        partial_rotary_factor=0.75,
        rope_scaling=longrope(3),
        tie_word_embeddings=True,
    ),
    "bitnet 2b": llama(32, 4, 40, 64, "bitnet", num_key_value_heads=2, rope_theta=500000.0, hidden_act="relu2"),
    "opt": opt(32, 4, 128, 64),
    "opt, untied": opt(30, 3, 41, 67, tie_word_embeddings=False),
    "bloom": bloom(64, n_embed=32, num_attention_heads=4, layer_norm_epsilon=1e-5, offset_alibi=100),
    "bloom, 6 heads": bloom(67, hidden_size=36, n_head=6, layer_norm_epsilon=1e-3),
}
OWN_HEAD = ("llama, tied, with another head",)


def main() -> None:
    names = sys.argv[1:] or list(CONFIGS)
    if unknown := sorted({*names} - {*CONFIGS}):
        raise SystemExit(f"no checkpoint is named {unknown[0]!r}: give some of {', '.join(CONFIGS)}")
    stored, all_logits, before = {}, {}, read()
    for name, config in CONFIGS.items():
        if name not in names:
            kept = before[name]
            stored[name] = {"configs": kept.configs, "own_head": kept.own_head, "ids": kept.ids.tolist()}
            all_logits[name] = kept.logits
            continue
        own_head = name in OWN_HEAD
        weights, ids = make_weights(config, own_head), make_ids(config)
        logits, new_config = transformers_logits(config, weights, ids)
        again, _ = transformers_logits(new_config, weights, ids)
        np.testing.assert_array_equal(again, logits, err_msg=name)
        stored[name] = {"configs": {"4": config, "5": new_config}, "own_head": own_head, "ids": ids.tolist()}
        all_logits[name] = logits
    lines = [f"{json.dumps(name)}: {json.dumps(fields)}" for name, fields in stored.items()]
    (FOLDER / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    np.savez_compressed(FOLDER / "logits.npz", **all_logits)
    for file in ("golden.json", "logits.npz"):
        print(file, (FOLDER / file).stat().st_size, "bytes")


@torch.no_grad()
def transformers_logits(
    config: dict[str, Any], weights: dict[str, np.ndarray], ids: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits, and config.json as this version of transformers writes it."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write(Path(folder), config, weights, np.float32, 1)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        model.config.save_pretrained(directory / "again")
        new_config = json.loads((directory / "again" / "config.json").read_text())
    return model.eval()(torch.from_numpy(ids).long()).logits.numpy(), new_config


if __name__ == "__main__":
    main()

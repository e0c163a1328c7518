"""Qwen3-MoE (arXiv 2505.09388) as Hugging Face stores it: a Qwen3 with experts in all layers, or in some.

Tensors have the names of transformers 4, an expert each, which transformers 5 writes too; or those of its modules, all
experts of a layer in one tensor.
"""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.expert_config import Experts
from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.architectures.llama import (
    IGNORED,
    IN_LAYER,
    TOP,
    refuse_biases,
    shared_fields,
)
from bipolar_jax.models.loaders.huggingface.architectures.mixtral import OF_EXPERTS, read_experts
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.layer_types import MOST_LAYERS, read_windows, sliding_window
from bipolar_jax.models.loaders.huggingface.rope import rope_config


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 32768)
    refuse_biases(fields)
    shared = shared_fields(fields, context, kv_heads=4)
    # Unlike Qwen3, transformers gives all layers the window.
    window = sliding_window(fields, 4096, context) if fields.flag("use_sliding_window", False) else None
    return dict(
        **shared,
        **rope_config(fields, context),
        **read_windows(fields, shared["num_layers"], window),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qk_norm=True,
        experts=_experts(fields, shared["num_layers"]),
    )


def _experts(fields: Fields, num_layers: int) -> Experts | None:
    """Those of every `decoder_sparse_step`-th layer that is none of `mlp_only_layers`; None if no layer has any."""
    if num_layers > MOST_LAYERS:
        raise fields.wrong("num_hidden_layers", num_layers, f"at most {MOST_LAYERS} beside experts")
    step, dense = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.wrong("mlp_only_layers", dense, "a list of indices of layers")
    named = {*dense}
    dense = tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    if len(dense) == num_layers or 0 in (fields.get("num_experts"), fields.get("num_local_experts")):
        return None
    return read_experts(
        fields,
        count=128,
        per_token=8,
        ffn_size=fields.size("moe_intermediate_size", 768),
        normalize=fields.flag("norm_topk_prob", False),
        dense_layers=dense,
    )


QWEN3_MOE = Architecture(
    _translate,
    prefixes=("model.",),
    layers="layers.",
    top=TOP,
    in_layer=IN_LAYER
    | {"self_attn.q_norm": "attention/q_norm", "self_attn.k_norm": "attention/k_norm", "mlp.gate": "ffn/router"}
    | {f"mlp.experts.*.{name}_proj": f"ffn/experts/*/{name}_proj" for name in ("gate", "up", "down")},
    ignored=IGNORED,
    defaults={"intermediate_size": 6144},
    of_experts=OF_EXPERTS,
)

"""Phi-3 and Phi-4-mini (arXiv 2404.14219, 2503.01743) as Hugging Face stores them: projections lie side by side."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture, SideBySide
from bipolar_jax.models.loaders.huggingface.architectures.llama import (
    IGNORED,
    IN_LAYER,
    TOP,
    refuse_biases,
    shared_fields,
)
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.layer_types import read_windows, sliding_window
from bipolar_jax.models.loaders.huggingface.rope import rope_config


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 4096)
    refuse_biases(fields)
    shared = shared_fields(fields, context, kv_heads=None, norm_eps=1e-5)
    return dict(
        **shared,
        # transformers reads "su" and "yarn", the names of early checkpoints, as "longrope".
        **rope_config(fields, context, head_dim=shared["head_dim"], renamed={"su": "longrope", "yarn": "longrope"}),
        **read_windows(fields, shared["num_layers"], sliding_window(fields, None, context)),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


PHI3 = Architecture(
    _translate,
    prefixes=("model.",),
    layers="layers.",
    top=TOP,
    in_layer={name: ours for name, ours in IN_LAYER.items() if ours.endswith(("norm", "o_proj", "down_proj"))}
    | {
        "self_attn.qkv_proj": SideBySide(("attention/q_proj", "attention/k_proj", "attention/v_proj")),
        "mlp.gate_up_proj": SideBySide(("ffn/gate_proj", "ffn/up_proj")),
    },
    ignored=IGNORED,
    defaults={"original_max_position_embeddings": 4096},
)

"""Mixtral (arXiv 2401.04088) as Hugging Face stores it: a Mistral whose feed-forward blocks have experts.

Tensors have the names of transformers 4, an expert each, which transformers 5 writes too; or those of its modules, all
experts of a layer in one tensor.
"""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.expert_config import Experts
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.architecture import Architecture
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

# Tensors of a layer with all its experts, as transformers 5 names its own parameters.
OF_EXPERTS = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
_THETA = 1e6


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 131072)
    refuse_biases(fields)
    shared = shared_fields(fields, context, kv_heads=8, norm_eps=1e-5)
    return dict(
        **shared,
        **rope_config(fields, context),
        **read_windows(fields, shared["num_layers"], sliding_window(fields, None, context)),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        experts=read_experts(fields, count=8, per_token=2, ffn_size=shared["ffn_size"]),
    )


def read_experts(
    fields: Fields,
    *,
    count: int,
    per_token: int,
    ffn_size: int,
    normalize: bool = True,
    dense_layers: tuple[int, ...] = (),
) -> Experts:
    """The experts of a layer; `count` and `per_token` are those of absent fields.

    Raises:
      ValueError: both names of the number of experts with different numbers, and as `Experts`.
    """
    names = [name for name in ("num_local_experts", "num_experts") if fields.get(name) is not None]
    counts = {fields.size(name) for name in names} or {count}
    if len(counts) > 1:
        raise ValueError(
            f"{fields.source} has num_local_experts and num_experts, which differ: delete the one that is wrong"
        )
    with errors_name(fields.source):
        return Experts(counts.pop(), fields.size("num_experts_per_tok", per_token), ffn_size, normalize, dense_layers)


MIXTRAL = Architecture(
    _translate,
    prefixes=("model.",),
    layers="layers.",
    top=TOP,
    in_layer={name: ours for name, ours in IN_LAYER.items() if not name.startswith("mlp.")}
    | {
        "block_sparse_moe.gate": "ffn/router",
        "block_sparse_moe.experts.*.w1": "ffn/experts/*/gate_proj",
        "block_sparse_moe.experts.*.w2": "ffn/experts/*/down_proj",
        "block_sparse_moe.experts.*.w3": "ffn/experts/*/up_proj",
        "mlp.gate": "ffn/router",
    },
    ignored=IGNORED,
    defaults={"rope_theta": _THETA},
    of_experts=OF_EXPERTS,
)

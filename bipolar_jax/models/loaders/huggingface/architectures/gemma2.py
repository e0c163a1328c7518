"""Gemma 2 (arXiv 2408.00118) as Hugging Face stores it: gains less 1, capped scores, windows in every second layer."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.architectures.llama import IN_LAYER, TOP, check_activation, shared_fields
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.layer_types import read_windows, sliding_window
from bipolar_jax.models.loaders.huggingface.rope import rope_config

_ATTENTION_CAP, _LOGIT_CAP = 50.0, 30.0

GEMMA_IN_LAYER = IN_LAYER | {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 8192)
    return dict(
        **gemma_fields(fields, context, attention_cap=_ATTENTION_CAP, logit_cap=_LOGIT_CAP),
        **rope_config(fields, context),
        **read_windows(
            fields,
            fields.size("num_hidden_layers"),
            sliding_window(fields, 4096, context),
            lambda layer: layer % 2 == 0,
        ),
    )


def gemma_fields(
    fields: Fields, context: int, *, attention_cap: float | None, logit_cap: float | None
) -> dict[str, Any]:
    """What Gemma 2 and 3 share; the caps are those of absent fields, null is none.

    Raises:
      ValueError: biases, attention in both directions, or another activation.
    """
    check_activation(fields, "hidden_activation", ("gelu_pytorch_tanh",))
    for name in ("attention_bias", "use_bidirectional_attention"):
        if fields.flag(name, False):
            raise ValueError(f"{fields.source} has {name} true, which is not supported")
    shared = shared_fields(fields, context, kv_heads=4, head_dim=256)
    return dict(
        **shared,
        ffn="geglu",
        post_norms=True,
        embed_scale=shared["hidden_size"] ** 0.5,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping", attention_cap),
        logit_softcap=_cap(fields, "final_logit_softcapping", logit_cap),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _cap(fields: Fields, name: str, absent: float | None) -> float | None:
    if name not in fields.values:
        return absent
    return None if fields.get(name) is None else fields.number(name)


GEMMA2 = Architecture(
    _translate,
    prefixes=("model.",),
    layers="layers.",
    top=TOP,
    in_layer=GEMMA_IN_LAYER,
    gains_less_one=True,
    defaults={"vocab_size": 256000, "num_attention_heads": 8, "bos_token_id": 2, "eos_token_id": 1},
)

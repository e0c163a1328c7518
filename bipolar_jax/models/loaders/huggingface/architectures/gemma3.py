"""Gemma 3 (arXiv 2503.19786) as Hugging Face stores it, alone or as the text model beside a vision model.

It is a Gemma 2 with normalized queries and keys in place of capped scores, and full attention in every sixth layer,
whose rotary frequencies are others than those of layers with a window. Images are not read: a folder of text and vision
gives the text model.
"""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.architectures.gemma2 import GEMMA_IN_LAYER, gemma_fields
from bipolar_jax.models.loaders.huggingface.architectures.llama import TOP
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.layer_types import FULL, SLIDING, read_windows, sliding_window
from bipolar_jax.models.loaders.huggingface.rope import rope_config

_PATTERN = 6
_THETA, _WINDOW_THETA = 1e6, 1e4


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 131072)
    pattern = fields.size("sliding_window_pattern", _PATTERN)
    windows = read_windows(
        fields,
        fields.size("num_hidden_layers"),
        sliding_window(fields, 4096),
        lambda layer: (layer + 1) % pattern != 0,
    )
    return dict(
        **gemma_fields(fields, context, attention_cap=None, logit_cap=None),
        **windows,
        **_rope(fields, context, has_windows=bool(windows)),
        qk_norm=True,
    )


def _rope(fields: Fields, context: int, *, has_windows: bool) -> dict[str, Any]:
    """rope_parameters by type of layer (new), or rope_theta, rope_scaling and rope_local_base_freq (old)."""
    new = fields.nested("rope_parameters")
    if new.values and fields.nested("rope_scaling").values:
        raise ValueError(f"{fields.source} has both rope_scaling and rope_parameters: delete the one that is wrong")
    if unknown := sorted(set(new.values) - {FULL, SLIDING}):
        raise ValueError(
            f"{fields.source} has rope_parameters with {unknown!s:.100}, expected those of {FULL} and of {SLIDING}"
        )
    thetas = {FULL: fields.get("rope_theta", _THETA), SLIDING: fields.get("rope_local_base_freq", _WINDOW_THETA)}
    own = {kind: {"rope_theta": theta, **new.nested(kind).values} for kind, theta in thetas.items()}
    if not new.values:
        own[FULL] |= fields.nested("rope_scaling").values
    full, windowed = (rope_config(Fields({"rope_parameters": own[kind]}, fields.source), context) for kind in own)
    if windowed["rope_scaling"] is not None:
        raise ValueError(
            f"{fields.source} scales the rotary frequencies of layers with a window: that is not supported"
        )
    return full | (dict(window_rope_theta=windowed["rope_theta"]) if has_windows else {})


GEMMA3 = Architecture(
    _translate,
    prefixes=("language_model.model.", "model.language_model.", "model."),
    layers="layers.",
    top=TOP,
    in_layer=GEMMA_IN_LAYER | {"self_attn.q_norm": "attention/q_norm", "self_attn.k_norm": "attention/k_norm"},
    gains_less_one=True,
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    text_config="text_config",
    other_models=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)

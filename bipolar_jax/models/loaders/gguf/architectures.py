"""The architectures of GGUF files: names of their tensors, and what llama.cpp computes beside what the metadata says.

Source: llama.cpp's src/llama-model.cpp and its converter, convert_hf_to_gguf.py. Gains of Gemma's norms are stored with
the 1 added. Only files of "llama" have the rows of q and k in another order, see `load`.
"""

from __future__ import annotations

import re
from typing import Any

from bipolar_jax.models.expert_config import Experts
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.gguf.metadata import Metadata

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3")
PERMUTED = ("llama",)  # whose q and k have the order of llama.cpp's rotation

# Tensor names in the file -> parameter paths of the Transformer.
TOP = {
    "token_embd.weight": "embed/embedding",
    "output_norm.weight": "final_norm/scale",
    "output.weight": "lm_head/kernel",
}
_LLAMA = {
    "attn_norm.weight": "attention_norm/scale",
    "ffn_norm.weight": "ffn_norm/scale",
    "attn_output.weight": "attention/o_proj/kernel",
    "ffn_gate.weight": "ffn/gate_proj/kernel",
    "ffn_up.weight": "ffn/up_proj/kernel",
    "ffn_down.weight": "ffn/down_proj/kernel",
} | {
    f"attn_{projection}.{kind}": f"attention/{projection}_proj/{variable}"
    for projection in "qkv"
    for kind, variable in (("weight", "kernel"), ("bias", "bias"))
}
_HEAD_NORMS = {"attn_q_norm.weight": "attention/q_norm/scale", "attn_k_norm.weight": "attention/k_norm/scale"}
# Of all experts of a layer in one tensor; the star stands for the expert's number.
_EXPERTS = {"ffn_gate_inp.weight": "ffn/router/kernel"} | {
    f"ffn_{name}_exps.weight": f"ffn/experts/*/{name}_proj/kernel" for name in ("gate", "up", "down")
}
# Of a single expert, in older files.
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d{1,9})\.weight")
_POST_NORMS = {"post_attention_norm.weight": "attention_post_norm/scale", "post_ffw_norm.weight": "ffn_post_norm/scale"}
# Parameters whose rows lie side by side in one tensor, in this order.
_QKV = tuple(f"attention/{projection}_proj/kernel" for projection in "qkv")
_IN_LAYER: dict[str, dict[str, str | tuple[str, ...]]] = {
    "llama": _LLAMA | _EXPERTS,
    "qwen3": _LLAMA | _HEAD_NORMS,
    "qwen3moe": _LLAMA | _HEAD_NORMS | _EXPERTS,
    "gemma2": _LLAMA | _POST_NORMS,
    "gemma3": _LLAMA | _HEAD_NORMS | _POST_NORMS,
    "phi3": _LLAMA | {"attn_qkv.weight": _QKV, "ffn_up.weight": ("ffn/gate_proj/kernel", "ffn/up_proj/kernel")},
}
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)")
# Layers without a window: the last of so many.
_PATTERNS = {"gemma2": 2, "gemma3": 6}
# Layers of the models of 27B parameters, whose scores are divided by sqrt(hidden / heads), not by sqrt(head_dim).
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# A damaged file may state billions of layers; a list of them would fill the memory.
_MOST_LAYERS = 1 << 16


def targets(name: str, arch: str, source: str) -> tuple[tuple[str, ...], int]:
    """The parameters whose rows a tensor holds, in order, and their layer, or -1 outside the layers.

    A star in a path stands for the number of an expert, all of which the tensor holds.

    Raises:
      ValueError: the architecture has no such tensor.
    """
    if name in TOP:
        return (TOP[name],), -1
    match = _BLOCK.fullmatch(name)
    in_layer = _IN_LAYER.get(arch, _LLAMA)
    paths = None if match is None else in_layer.get(match[2])
    one = None if match is None else _ONE_EXPERT.fullmatch(match[2])
    if one is not None and (together := in_layer.get(f"ffn_{one[1]}_exps.weight")) is not None:
        paths = together.replace("*", str(int(one[2])))
    if paths is None:
        raise ValueError(f"{source} has an unexpected tensor {name!r:.100}: no supported architecture has one")
    paths = (paths,) if isinstance(paths, str) else paths
    return tuple(f"layers/{path}" for path in paths), int(match[1])


def architecture_fields(metadata: Metadata, arch: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Fields of TransformerConfig that the architecture has beside sizes, norms' epsilon and RoPE.

    Args:
      metadata: the file's.
      arch: one of ARCHITECTURES.
      sizes: hidden_size, num_layers, num_heads, head_dim, ffn_size and context_length, as TransformerConfig has them.

    Raises:
      ValueError: invalid keys, windows of layers that the file does not name, or experts that are not served.
    """
    fields = _windows(metadata, arch, sizes)
    if (experts := _experts(metadata, arch, sizes["ffn_size"])) is not None:
        fields["experts"] = experts
    if arch in ("qwen3", "qwen3moe", "gemma3"):
        fields["qk_norm"] = True
    if arch not in _PATTERNS:
        return fields
    share = max(sizes["hidden_size"] // sizes["num_heads"], 1)
    is_27b = sizes["num_layers"] == _LAYERS_OF_27B[arch]
    fields |= dict(
        ffn="geglu",
        post_norms=True,
        embed_scale=sizes["hidden_size"] ** 0.5,
        attention_scale=(share if is_27b else sizes["head_dim"]) ** -0.5,
    )
    attention_cap, logit_cap = (50.0, 30.0) if arch == "gemma2" else (None, None)
    if arch == "gemma2":
        fields["attention_softcap"] = metadata.positive(f"{arch}.attn_logit_softcapping", attention_cap)
    fields["logit_softcap"] = metadata.positive(f"{arch}.final_logit_softcapping", logit_cap)
    if "window" in fields and arch == "gemma3":
        fields["window_rope_theta"] = float(metadata.positive(f"{arch}.rope.freq_base_swa", 10000.0))
    return fields


def _experts(metadata: Metadata, arch: str, ffn_size: int) -> Experts | None:
    """Those of every layer, whose weights llama.cpp divides by their sum; None for a dense model."""
    count = metadata.integer(f"{arch}.expert_count", 0)
    if count == 0:
        return None
    if arch not in ("llama", "qwen3moe"):
        raise ValueError(
            f"{metadata.source} has {count} experts: of architecture {arch} only dense models are supported"
        )
    if shared := metadata.integer(f"{arch}.expert_shared_count", 0):
        raise ValueError(f"{metadata.source} has {shared} experts that every token runs: that is not supported")
    used = f"{arch}.expert_used_count"
    per_token = metadata.require(metadata.integer(used, None), used)
    with errors_name(metadata.source):
        return Experts(count, per_token, metadata.integer(f"{arch}.expert_feed_forward_length", ffn_size))


def _windows(metadata: Metadata, arch: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields window and window_layers; none of them where no layer has a window."""
    key, context, layers = f"{arch}.attention.sliding_window", sizes["context_length"], sizes["num_layers"]
    window = metadata.integer(key, 4096 if arch == "gemma2" else 0)
    # The theta of Gemma 3's layers with a window depends on the window being there, however wide.
    if window == 0 or (window >= context and arch != "gemma3"):
        return {}
    if arch in ("llama", "phi3"):
        return dict(window=window)
    if arch not in _PATTERNS:
        raise ValueError(
            f"{metadata.source} attends to a sliding window of {window} of {context} positions, and does not say in "
            "which layers: that is not supported"
        )
    if layers > _MOST_LAYERS:
        raise ValueError(f"{metadata.source} has {layers} layers, at most {_MOST_LAYERS} are plausible")
    pattern_key = f"{key}_pattern"
    try:
        pattern = metadata.integer(pattern_key, _PATTERNS[arch], least=1)
        has_window = [layer % pattern < pattern - 1 for layer in range(layers)]
    except ValueError:
        has_window = metadata.array(pattern_key, bool)
        if len(has_window) != layers:
            raise ValueError(
                f"{metadata.source}: {pattern_key} has {len(has_window)} values for {layers} layers: download it again"
            ) from None
    found = tuple(layer for layer, each in enumerate(has_window) if each)
    if not found:
        return {}
    return dict(window=window, window_layers=None if len(found) == layers else found)

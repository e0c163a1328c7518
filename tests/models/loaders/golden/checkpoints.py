"""Tiny checkpoints whose logits transformers computed. Their weights follow from a hash, so none are stored.

`make.py` writes golden.json (the config.json of every checkpoint) and logits.npz; tests read them. Needs no JAX, since
`make.py` runs beside torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers

FOLDER = Path(__file__).parent
BATCH, LENGTH = 2, 12
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Golden:
    """A checkpoint, texts, and their logits.

    Attributes:
      configs: config.json by layout: "4" as transformers 4 wrote it, "5" as transformers 5 writes it.
      own_head: whether an output layer is stored although the config ties it to the embeddings.
      ids: [BATCH, LENGTH] token ids.
      logits: [BATCH, LENGTH, vocab] float32, by transformers.
    """

    configs: dict[str, dict[str, Any]]
    own_head: bool
    ids: np.ndarray
    logits: np.ndarray


def read() -> dict[str, Golden]:
    """All checkpoints by name."""
    stored = json.loads((FOLDER / "golden.json").read_text())
    with np.load(FOLDER / "logits.npz") as logits:
        return {
            name: Golden(fields["configs"], fields["own_head"], np.array(fields["ids"], np.int32), logits[name])
            for name, fields in stored.items()
        }


def make_ids(config: dict[str, Any]) -> np.ndarray:
    """[BATCH, LENGTH] token ids."""
    return _integers("ids", (BATCH, LENGTH), config["vocab_size"])


def make_weights(config: dict[str, Any], own_head: bool = False) -> dict[str, np.ndarray]:
    """The weights of a config in transformers 4's layout, by stored name; exact in float32, bfloat16 and float16."""
    architecture = config["model_type"]
    shapes = {"opt": _opt_shapes, "bloom": _bloom_shapes}.get(architecture, _llama_shapes)(config)
    if own_head or not config.get("tie_word_embeddings", architecture in ("opt", "bloom", "gemma2", "gemma3_text")):
        shapes[HEAD] = (config["vocab_size"], _hidden(config))
    less_one = architecture.startswith("gemma")
    return {name: _tensor(name, shape) - (less_one and len(shape) == 1) for name, shape in shapes.items()}


def write(directory: Path, config: dict[str, Any], weights: dict[str, np.ndarray], dtype: Any, shards: int) -> Path:
    """Writes config.json, tokenizer.json and the weights, in one file or in shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    vocabulary = {f"token{token}": token for token in range(config["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="token0"))
    tokenizer.save(str(directory / "tokenizer.json"))
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    if shards == 1:
        safetensors.numpy.save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return directory
    file_of = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in set(file_of.values()):
        safetensors.numpy.save_file(
            {name: weights[name] for name in weights if file_of[name] == file}, directory / file
        )
    index = {"metadata": {}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _integers(name: str, shape: tuple[int, ...], count: int) -> np.ndarray:
    """int32 from 0 to count - 1: lowbias32, an integer hash by C. Wellons (nullprogram.com/blog/2018/07/31)."""
    x = np.arange(math.prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return (x % np.uint32(count)).astype(np.int32).reshape(shape)


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of a power of two up to 127: bfloat16 holds 8 bits. Biases and norms are random too."""
    values = (_integers(name, shape, 255) - 127).astype(np.float32)
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        return values / 256
    if len(shape) == 1:  # a norm
        return 1 + np.round(values / 4) / 128
    if "embed" in module:
        return values / 128
    return values * np.float32(2.0 ** -round(math.log2(73 * shape[1] ** 0.5)))  # 73 is the deviation of `values`


def _hidden(config: dict[str, Any]) -> int:
    return config["hidden_size"] if "hidden_size" in config else config["n_embed"]


def _llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    kv_heads, head_dim = config.get("num_key_value_heads", heads), config.get("head_dim", hidden // heads)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {name + f"{norm}.weight": size for norm, size in _norms(config, heads * head_dim, head_dim).items()}
        for projection, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[name + f"self_attn.{projection}_proj.weight"] = (count * head_dim, hidden)
            if config["model_type"] == "qwen2":
                shapes[name + f"self_attn.{projection}_proj.bias"] = (count * head_dim,)
        shapes[name + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        if _has_experts(config, layer):
            shapes |= {name + module + ".weight": shape for module, shape in _experts(config).items()}
        else:
            shapes |= {name + f"mlp.{projection}_proj.weight": (ffn, hidden) for projection in ("gate", "up")}
            shapes[name + "mlp.down_proj.weight"] = (hidden, ffn)
        if config["model_type"] == "phi3":
            _join(shapes, name + "self_attn.", ("q", "k", "v"), "qkv")
            _join(shapes, name + "mlp.", ("gate", "up"), "gate_up")
    return shapes


def _has_experts(config: dict[str, Any], layer: int) -> bool:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return config["model_type"] == "mixtral" or (
        config["model_type"] == "qwen3_moe" and layer not in dense and (layer + 1) % step == 0
    )


def _experts(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The router and the experts of a layer, as transformers 4 names them."""
    hidden = config["hidden_size"]
    if config["model_type"] == "mixtral":
        name, parts, ffn = "block_sparse_moe", ("w1", "w3", "w2"), config["intermediate_size"]
        count = config["num_local_experts"]
    else:
        name, parts, ffn = "mlp", ("gate_proj", "up_proj", "down_proj"), config["moe_intermediate_size"]
        count = config["num_experts"]
    shapes = {f"{name}.gate": (count, hidden)}
    for expert in range(count):
        sizes = zip(parts, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True)
        shapes |= {f"{name}.experts.{expert}.{part}": size for part, size in sizes}
    return shapes


def with_experts_together(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights with all experts of a layer in one tensor, as transformers 5 names the parameters of its modules."""
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    together = {}
    for name, array in weights.items():
        match = re.fullmatch(r"(.+)\.experts\.\d+\.(\w+)\.weight", name)
        if match is None:
            together[name.replace("block_sparse_moe", "mlp")] = array
        else:
            of_layer = found.setdefault(match[1].replace("block_sparse_moe", "mlp"), {})
            of_layer.setdefault(parts.get(match[2], match[2]), []).append(array)
    for name, layer in found.items():
        gate, up, down = (np.stack(layer[part]) for part in parts.values())
        together |= {f"{name}.experts.gate_up_proj": np.concatenate([gate, up], 1), f"{name}.experts.down_proj": down}
    return together


def _norms(config: dict[str, Any], query_size: int, head_dim: int) -> dict[str, tuple[int]]:
    """Sizes of the norms of a layer."""
    hidden, architecture = (config["hidden_size"],), config["model_type"]
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if architecture.startswith("gemma"):
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if architecture in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    if architecture == "bitnet":
        norms |= {"self_attn.attn_sub_norm": (query_size,), "mlp.ffn_sub_norm": (config["intermediate_size"],)}
    return norms


def _join(shapes: dict[str, tuple[int, ...]], name: str, parts: tuple[str, ...], whole: str) -> None:
    """One projection in place of several, whose rows it has."""
    sizes = [shapes.pop(f"{name}{part}_proj.weight") for part in parts]
    shapes[f"{name}{whole}_proj.weight"] = (sum(size[0] for size in sizes), sizes[0][1])


def _opt_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config["hidden_size"], config["ffn_dim"]
    shapes = {
        "model.decoder.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    modules = {"model.decoder.final_layer_norm": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.decoder.layers.{layer}."
        modules |= {name + f"self_attn.{p}_proj": (hidden, hidden) for p in ("q", "k", "v", "out")}
        modules |= {name + "fc1": (ffn, hidden), name + "fc2": (hidden, ffn)}
        modules |= {name + f"{norm}_layer_norm": (hidden,) for norm in ("self_attn", "final")}
    return shapes | _with_biases(modules)


def _bloom_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = _hidden(config)
    modules = {"transformer.word_embeddings_layernorm": (hidden,), "transformer.ln_f": (hidden,)}
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}."
        modules |= {name + f"{norm}_layernorm": (hidden,) for norm in ("input", "post_attention")}
        modules[name + "self_attention.query_key_value"] = (3 * hidden, hidden)
        modules[name + "self_attention.dense"] = (hidden, hidden)
        modules |= {name + "mlp.dense_h_to_4h": (4 * hidden, hidden), name + "mlp.dense_4h_to_h": (hidden, 4 * hidden)}
    return {"transformer.word_embeddings.weight": (config["vocab_size"], hidden)} | _with_biases(modules)


def _with_biases(modules: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weight and the bias of every module."""
    return {
        f"{module}.{kind}": shape if kind == "weight" else shape[:1]
        for module, shape in modules.items()
        for kind in ("weight", "bias")
    }

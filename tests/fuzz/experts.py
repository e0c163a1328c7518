"""Readers of files with experts: Mixtral and Qwen3-MoE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bipolar_jax.models.loaders import load_gguf, load_huggingface
from tests.fuzz import mutations
from tests.fuzz.reader import Reader
from tests.models.loaders import tiny_quantized
from tests.models.loaders.golden import checkpoints
from tests.models.loaders.test_gguf_architectures import write_gguf
from tests.models.loaders.test_quantized_formats import gptq_config
from tests.support import tiny_checkpoints as tiny

# Golden checkpoints, and fields with which every row is whole blocks of 32 weights.
MIXTRAL, QWEN3 = "mixtral 8x7b", "qwen3 30b a3b"
_WHOLE_BLOCKS = {
    MIXTRAL: {"intermediate_size": 64},
    QWEN3: {"head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 32},
}
_GGUF_NAMES = (
    b"expert_count", b"expert_used_count", b"expert_feed_forward_length", b"ffn_gate_inp.weight",
    b"ffn_down_exps.weight", b"ffn_gate_exps.weight", b"ffn_up_exps.weight", b".block_count", b"feed_forward_length",
)  # fmt: skip


def make_readers(folder: Path) -> dict[str, Reader]:
    """The readers by name; writes their files below `folder`."""
    return {
        "experts": _safetensors(folder / "experts", MIXTRAL),
        "experts_together": _safetensors(folder / "experts_together", QWEN3),
        "experts_config": _config(folder / "experts_config"),
        "experts_gptq": _gptq(folder / "experts_gptq"),
        "experts_gguf": _gguf(folder / "mixtral.gguf", MIXTRAL),
        "experts_gguf_integers": _gguf(folder / "qwen3moe.gguf", QWEN3, activations=16),
    }


def _safetensors(directory: Path, name: str) -> Reader:
    """model.safetensors with a tensor for each expert (Mixtral), or one for those of a layer (Qwen3)."""
    config = checkpoints.read()[name].configs["4"]
    weights = checkpoints.make_weights(config)
    if name == QWEN3:
        weights = checkpoints.with_experts_together(weights)
    checkpoints.write(directory, config, weights, np.float16, 1)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_safetensors(raw, rng), lambda: load_huggingface(directory))


def _config(directory: Path) -> Reader:
    """config.json of both, beside the weights of Mixtral, whose shapes it has to fit."""
    golden = checkpoints.read()
    fields = golden[MIXTRAL].configs["4"]
    checkpoints.write(directory, fields, checkpoints.make_weights(fields), np.float16, 1)
    path = directory / "config.json"
    variants = [golden[name].configs[layout] for name in (MIXTRAL, QWEN3) for layout in "45"]

    def damage(rng):
        return mutations.damaged_json(rng.choice([fields, *variants]), rng).encode("utf-8", "replace")

    return Reader(path, json.dumps(fields).encode(), damage, lambda: load_huggingface(directory))


def _gptq(directory: Path) -> Reader:
    """Experts in GPTQ's format, one of each layer with its inputs in another order."""
    order = np.random.default_rng(1).permutation(tiny.HIDDEN)

    def make(name, n, k):
        ordered = "experts.1." in name and k == tiny.HIDDEN
        return tiny_quantized.gptq(np.random.default_rng(n), n, k, order=order if ordered else None)

    model = tiny_quantized.with_experts(tiny.make(), 2, 1, 32)
    tiny_quantized.write(directory, gptq_config(desc_act=True), make, model=model)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_safetensors(raw, rng), lambda: load_huggingface(directory))


def _gguf(path: Path, name: str, activations: int | None = None) -> Reader:
    """Q8_0, dequantized or as it is."""
    keys = {"qwen3moe.expert_feed_forward_length": 32} if name == QWEN3 else {}
    raw = write_gguf(name, path, keys, type_name="Q8_0", **_WHOLE_BLOCKS[name]).read_bytes()

    def damage(rng):
        return mutations.damaged_gguf(raw, rng, _GGUF_NAMES)

    return Reader(path, raw, damage, lambda: load_gguf(path, activations=activations))

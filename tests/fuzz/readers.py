"""The readers under test: each damages one file of an intact model and reads it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import bipolar_jax as bj
from bipolar_jax.models.blocks.rope import rope_frequencies
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.loaders import load_gguf, load_huggingface
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.models.tokenizer_json import load_tokenizer
from tests.fuzz import mutations
from tests.support import tiny_checkpoints as tiny


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and the file that it is given damaged.

    Attributes:
      path: the damaged file.
      intact: its content.
      damage: returns a damaged content.
      read: reads it, and uses what it read where damage would only show then.
    """

    path: Path
    intact: bytes
    damage: Callable[[random.Random], bytes]
    read: Callable[[], Any]


def make_readers(folder: Path) -> dict[str, Reader]:
    """All readers by name; writes their files below `folder`."""
    checkpoint = tiny.make()
    return {
        "packed": _packed(folder),
        "gguf": _gguf(folder, checkpoint),
        "safetensors": _safetensors(folder, checkpoint),
        "config": _config(folder, checkpoint),
        "tokenizer": _tokenizer(folder, checkpoint),
        "index": _index(folder, checkpoint),
    }


def _packed(folder: Path) -> Reader:
    path = folder / "packed.safetensors"
    loaded = load_huggingface(tiny.write_huggingface(tiny.make(), folder / "float"))
    model = bj.quantize_model(
        loaded.model, [("attention", bj.Precision(3, 8, 16, "minmax")), (".*", bj.Precision(4, 8))]
    )
    save_model(path, dataclasses.replace(loaded, model=model))
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_packed(raw, rng), lambda: load_model(path))


def _gguf(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    path = tiny.write_gguf(checkpoint, folder / "model.gguf", "Q8_0")
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_gguf(raw, rng), lambda: load_gguf(path))


def _safetensors(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "safetensors", dtype="bfloat16")
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_safetensors(raw, rng), lambda: load_huggingface(directory))


def _config(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "config")
    path = directory / "config.json"
    fields = tiny.hf_config(checkpoint)
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.0}
    variants = [
        fields,
        fields | {"rope_scaling": scaled | {"beta_fast": 32.0, "beta_slow": 1.0}},
        fields | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        fields | {"model_type": "mistral", "sliding_window": 4096, "layer_types": ["full_attention"] * 3},
    ]

    def read():
        _, config = read_config(directory)
        if config.positions == "rope" and config.head_dim <= 1024:
            frequencies, factor = rope_frequencies(config)
            angles = np.float32(frequencies) * np.float32(factor)
            assert np.isfinite(angles).all(), "the logits would be NaN"
        jnp.zeros((), jnp.int32) + config.context_length

    def damage(rng):
        return mutations.damaged_json(rng.choice(variants), rng).encode("utf-8", "replace")

    return Reader(path, json.dumps(fields).encode(), damage, read)


def _tokenizer(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "tokenizer")
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text())
    # Fewer tokens, so that changes meet the rest of the file too.
    fields["model"]["merges"] = fields["model"]["merges"][:8]
    fields["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    fields["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "x"}]}

    def read():
        tokenizer = load_tokenizer(path, 400)
        tokenizer.decode(tokenizer.encode("the quick brown fox, in 1984\n").ids)

    def damage(rng):
        return mutations.damaged_json(fields, rng).encode("utf-8", "replace")

    return Reader(path, json.dumps(fields).encode(), damage, read)


def _index(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "index", shards=3)
    path = directory / "model.safetensors.index.json"
    fields = json.loads(path.read_text())

    def damage(rng):
        return mutations.damaged_json(fields, rng).encode("utf-8", "replace")

    return Reader(path, path.read_bytes(), damage, lambda: load_huggingface(directory))

"""Writes a GGUF file of random weights in the shapes of a published model, so that its type can be loaded and timed.

    python -m experiments.bench.language_models.random_gguf --config=configs/bench/random_gguf.py --workdir=DIR

The file is DIR/model.gguf, in the layout of the published ones; its integers are random, and their scale gives weights
of the size that models begin with. `experiments.generate` and `experiments.evaluate` take it, with
--config.activations, and `experiments.bench.llm` times it; the texts mean nothing. Matrices are drawn and written one
after the other.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bipolar_jax.extras import require
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.exporters.gguf import IN_LAYER, TOP
from bipolar_jax.models.exporters.gguf_metadata import config_metadata
from bipolar_jax.models.exporters.huggingface_config import model_type
from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.models.loaders.gguf.header import TENSOR_TYPES
from bipolar_jax.models.presets import preset
from experiments.support import app
from experiments.support.progress import console, progress_bar

# Types whose blocks begin with their only scale.
TYPES = ("Q1_0", "Q4_0", "Q5_0", "Q8_0")
_KEY = "tokenizer.ggml"
_UNUSED, _NORMAL = 5, 1


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program; see the module docstring."""
    for name in ("type", "embedding_type"):
        if config[name] not in TYPES:
            raise ValueError(f"config.{name} is {config[name]!r}, choose one of {', '.join(TYPES)}")
    model_config = preset(config.model)
    if config.layers:
        model_config = dataclasses.replace(model_config, num_layers=config.layers)
    arch = model_type(model_config)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "model.gguf"
    library, rng = require("gguf", "models"), np.random.default_rng(config.seed)
    writer = library.GGUFWriter(path, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (config_metadata(model_config, arch) | _tokenizer(model_config)).items():
        add.get(type(value), writer.add_array)(key, value)
    numbers = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
    with progress_bar(f"drawing {config.model}"):
        for name, shape in tensor_shapes(model_config).items():
            if len(shape) == 1:
                writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
                continue
            kind = config.type if name.startswith("blk.") else config.embedding_type
            writer.add_tensor(f"{name}.weight", random_rows(rng, kind, *shape), raw_dtype=numbers[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    console.print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Outputs and inputs of every tensor of a Llama, Qwen2 or Qwen3 model, by its name in the file."""
    hidden, heads, kv_heads = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    matrices = {"q": (heads, hidden), "k": (kv_heads, hidden), "v": (kv_heads, hidden), "o": (hidden, heads)}
    matrices |= {"gate": (config.ffn_size, hidden), "up": (config.ffn_size, hidden), "down": (hidden, config.ffn_size)}
    shapes = {TOP["embed"]: (config.vocab_size, hidden), TOP["final_norm"]: (hidden,)}
    if not config.tie_embeddings:
        shapes[TOP["lm_head"]] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for ours, name in IN_LAYER.items():
            part = ours.split("/")[-1].removesuffix("_proj")
            if part in matrices:
                shapes[f"blk.{layer}.{name}"] = matrices[part]
            elif part in ("q_norm", "k_norm"):
                shapes |= {f"blk.{layer}.{name}": (config.head_dim,)} if config.qk_norm else {}
            else:
                shapes[f"blk.{layer}.{name}"] = (hidden,)
    return shapes


def random_rows(rng: np.random.Generator, type_name: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks whose weights have the variance 1 / columns, uint8 [rows, bytes]."""
    form, (_, weights, nbytes) = (
        BLOCK_TYPES[type_name].form,
        next(t for t in TENSOR_TYPES.values() if t[0] == type_name),
    )
    if columns % weights:
        raise ValueError(f"rows of {columns} weights are no whole blocks of {weights}, as {type_name} has")
    raw = rng.integers(0, 256, (rows, columns // weights, nbytes), np.uint8)
    integers = np.arange(1 << BLOCK_TYPES[type_name].bits) * form.factor - form.zero
    scale = np.float16((np.mean(integers**2) * columns) ** -0.5)
    raw[..., :2] = np.array([scale]).view(np.uint8)
    return raw.reshape(rows, -1)


def _tokenizer(config: TransformerConfig) -> dict[str, Any]:
    """Keys of a byte-level tokenizer whose tokens are those of single bytes, a pair, and unused ones."""
    alphabet = sorted(require("tokenizers", "models").pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab"]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    keys = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": [_NORMAL] * (len(alphabet) + 1) + [_UNUSED] * (config.vocab_size - len(alphabet) - 1),
        "merges": ["a b"],
        "add_bos_token": False,
    }
    ids = dict(zip(("eos", "eot"), config.eos_ids, strict=False))
    keys |= {f"{name}_token_id": token for name, token in ids.items()}
    return {f"{_KEY}.{name}": value for name, value in keys.items()}


def command() -> None:
    """The command line."""
    app.run(main, example="bench/random_gguf")


if __name__ == "__main__":
    command()

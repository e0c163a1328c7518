"""Samples a training text from a model itself, for distillation without the data that it was trained on.

    python -m experiments.sample_text --config=configs/sample_text.py --workdir=DIR

Data-free distillation (LLM-QAT, arXiv 2305.17888) trains a quantized model on text that its float original generates.
Each text starts from a random token, so that texts differ. Writes result.json and text.txt to --workdir; name text.txt
in `text` of a training config. With --config.mesh.data=2 two devices divide the texts of a batch; with
--config.mesh.model=2 they share the weights of a packed model, and divide the texts of a float one, which is not cut.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.sampling import Sampling
from bipolar_jax.models.inference.xla_flags import enable_command_buffers
from bipolar_jax.models.tokenizer_json import encode

from .distributed.mesh import cuts_of, mesh_of, writer_on_mesh
from .support import app
from .support.progress import console, progress_bar
from .support.sources import load_model_source, model_fingerprint
from .support.workdir import RESULT_NAME, environment, write_json

TEXT_NAME = "text.txt"


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    if config.texts < 1 or config.batch_size < 1:
        raise ValueError(f"texts={config.texts} and batch_size={config.batch_size} must be at least 1")
    enable_command_buffers()
    mesh = mesh_of(config)
    pretrained = writer_on_mesh(load_model_source(config.model), mesh, cuts_of(config), config.batch_size)
    sampling = Sampling(config.temperature, config.top_k or None, config.top_p)
    prefix = encode(pretrained.tokenizer, config.prefix, add_special_tokens=False) if config.prefix else []
    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    texts, tokens, started = [], 0, time.perf_counter()
    with progress_bar("generating texts", config.texts) as advance:
        while len(texts) < config.texts:
            first = rng.integers(0, pretrained.model.config.vocab_size, config.batch_size)
            prompts = [[*prefix, int(token)] for token in first]
            key, used = jax.random.split(key)
            written = generate(pretrained.model, prompts, config.length - len(prefix) - 1, sampling, used)
            ids = [[int(token), *text] for token, text in zip(first, written, strict=True)]
            tokens += sum(map(len, ids))
            texts += pretrained.tokenizer.decode_batch(ids)
            advance(len(texts), f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")
    with atomic_write(workdir / TEXT_NAME) as partial:
        partial.write_text("\n\n".join(texts), encoding="utf-8")
    result = {
        "settings": config.to_dict() | {"model_fingerprint": model_fingerprint(config.model)},
        "environment": environment(),
        "texts": len(texts),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(workdir / RESULT_NAME, result)
    console.print(f"{len(texts)} texts, {tokens} tokens: {workdir / TEXT_NAME}")


if __name__ == "__main__":
    app.run(main, example="sample_text")

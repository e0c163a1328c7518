"""Compares sizes of R4's blocks by the error that rounding leaves in the outputs of down, layer by layer.

    python -m experiments.bench.rotation_blocks --config=configs/bench/rotation_blocks.py --workdir=DIR \\
        --config.model=smollm2 --config.text=PATH --config.blocks=0,64,256

Inputs and weights of down are rotated and rounded to nearest in every layer of the float model. The squared errors of
the products, summed over a text, are compared with those of the first block size: the geometric mean of the layers'
ratios. No rounded layer feeds another, so that the figures have none of the noise of a rounded model's perplexity.
Writes result.json to --workdir.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.models.tokenizer_json import encode
from bipolar_jax.nn.compressible import Compressible, layer_at
from bipolar_jax.ops import Hadamard, hadamard
from experiments.support import app
from experiments.support.progress import console, progress_bar
from experiments.support.sources import load_model_source, load_text_source
from experiments.support.workdir import RESULT_NAME, environment, write_json

_NONE = "none"


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    precisions = [bj.Precision.parse(name) for name in app.split_names(config.precisions)]
    names = app.split_names(config.blocks)
    if unknown := [name for name in names if name != _NONE and not name.isdecimal()]:
        raise ValueError(f"config.blocks has {unknown[0]!r}: write numbers, 0 for the most, or {_NONE!r}")
    pretrained = load_model_source(config.model)
    model, size = pretrained.model, pretrained.model.config.ffn_size
    rotations = {name: None if name == _NONE else hadamard(size, block=int(name) or None) for name in names}
    ids = encode(pretrained.tokenizer, load_text_source(config.text), add_special_tokens=False)
    ids = np.asarray(ids[: config.windows * config.window_length], np.int32).reshape(config.windows, -1)
    layers = []
    with progress_bar("layers", model.num_blocks) as advance:
        carry = jax.jit(lambda model, ids: model.enter_blocks(ids))(model, ids)
        for index in range(model.num_blocks):
            block = model.block(index)
            layers.append(_errors(model, block, carry, tuple(rotations.values()), tuple(precisions)))
            carry = _next(model, block, carry)
            advance(index + 1, "blocks")
    ratios = np.log(np.array(layers))  # [layers, blocks, precisions]
    ratios = np.exp(np.mean(ratios - ratios[:, :1], axis=0))
    rows = {
        name: dict(zip(map(str, precisions), map(float, row), strict=True))
        for name, row in zip(names, ratios, strict=True)
    }
    result = {"settings": config.to_dict(), "environment": environment(), "squared_error": rows}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RESULT_NAME, result)
    table = Table("block", *map(str, precisions), title=f"squared error of down's outputs, {names[0]} is 1")
    for name, row in rows.items():
        table.add_row(name, *(f"{ratio:.3f}" for ratio in row.values()))
    console.print(table)


@jax.jit
def _next(model: Compressible, block: nnx.Module, carry):
    return model.run_block(block, carry)


@jax.jit(static_argnames=("rotations", "precisions"))
def _errors(model, block, carry, rotations, precisions) -> Float[Array, "blocks precisions"]:
    """Squared errors of a layer's outputs of down."""
    sites = model.block_sites[-1:]
    x, _ = site_inputs(model, block, carry, sites)
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w = layer_at(block, sites[0].names[0]).kernel[...].astype(jnp.float32)
    exact = jnp.dot(x, w, precision="highest")

    def error(rotation: Hadamard | None, precision: bj.Precision) -> Float[Array, ""]:
        tokens, weights = (x, w) if rotation is None else (rotation.rotate(x), rotation.rotate(w.T).T)
        weights = bj.quantize(weights, precision.w_bits, -2, group_size=precision.group_size).dequantize()
        if precision.a_bits is not None:
            tokens = quantize_tokens(tokens, precision.a_format).dequantize(precision.a_format)
        return jnp.sum((jnp.dot(tokens, weights, precision="highest") - exact) ** 2)

    return jnp.stack([jnp.stack([error(rotation, each) for each in precisions]) for rotation in rotations])


def command() -> None:
    """The command line."""
    app.run(main, example="bench/rotation_blocks")


if __name__ == "__main__":
    command()

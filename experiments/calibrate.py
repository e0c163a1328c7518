"""Quantizes a language model with text that shows what its layers get, and measures the perplexity and size of each.

    python -m experiments.calibrate --config=configs/calibrate.py --workdir=DIR \\
        --config.text=PATH --config.windows=20 --config.precisions=W4A8,W4A8g64

The model is rotated (QuaRot), then its layers are rounded one after the other (GPTQ and coordinate descent);
--config.rounded names precisions that are also rounded to nearest, without rotation or text, as a comparison. Writes to
--workdir result.json, perplexity.png and, per precision, a packed checkpoint that experiments/generate.py reads. A
stopped run resumes: within a precision from the last block that was finished. With --config.mesh.model=2 packed models
are scored on two devices; one calibrates.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.compress.rotations.plan import Kind
from bipolar_jax.kernels.device import default_device
from bipolar_jax.models.blocks.feed_forward import gate_activation
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.inference.xla_flags import pin_float_products
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import encode
from bipolar_jax.models.transformer import Transformer

from .support import app
from .support.precision_sweep import BY_RULES, EMBEDDING, MADE, ROUNDED, Loaded, Sweep, read_rules, rules_of_row
from .support.progress import console, progress_bar
from .support.sources import load_text_source

# Settings that the perplexity depends on.
_SETTINGS = (
    "model",
    "text",
    "windows",
    "window_length",
    "embedding_precision",
    "embedding_calibration",
    "rules",
    "rotation",
    "rotation_block",
    "rounding",
    "reconstruction",
    "rounded_bits",
    "learn_spans",
    "cache_bits",
    "seed",
)
_CALIBRATION = ("calibration_text", "calibration_windows", "calibration_length")
_TOKENS_NAME = "calibration_tokens.npy"
_WRITTEN_AT_ONCE = 128  # windows, on a GPU: 9 GB of keys and values with Llama-3-8B


def main(config: ConfigDict, workdir: Path, loaded: Loaded | None = None) -> None:
    """Runs the experiment; see the module docstring. `loaded` has the config's model and text, if another run has."""
    precisions, rounded = (
        [bj.Precision.parse(text) for text in app.split_names(names)] for names in (config.precisions, config.rounded)
    )
    own_rules = read_rules(config.rules)
    if not precisions and not own_rules:
        raise ValueError("config.precisions is empty: name at least one, such as W4A8g64, or give config.rules")
    precisions = precisions or [BY_RULES]
    method = bj.compress.Rounding(**config.rounding)
    if config.rotation not in get_args(Kind):
        raise ValueError(f"config.rotation is {config.rotation!r}: choose from {', '.join(get_args(Kind))}")
    if min(config.calibration_windows, config.calibration_length) < 1:
        raise ValueError("config.calibration_windows and config.calibration_length must be at least 1")
    if config.rounded_bits and precisions == [BY_RULES]:
        raise ValueError("config.rounded_bits names the bits of precisions: leave it 0 beside rules for all layers")
    for precision in precisions if precisions != [BY_RULES] else []:
        method.check(_as_rounded(precision, config))
    embedding = bj.Precision.parse(config.embedding_precision, config.embedding_calibration or None)
    first_rules = [*own_rules, (EMBEDDING, embedding)]
    sections = (MADE, ROUNDED) if rounded else (MADE,)
    sweep = Sweep.begin(config, workdir, (*_SETTINGS, *_CALIBRATION), sections, loaded, rules=own_rules)
    for precision in [*precisions, *rounded]:  # reject impossible precisions before measuring
        sweep.check(rules_of_row(first_rules, precision))
    experts = sweep.pretrained.model.config.experts is not None
    reconstructions = {
        str(precision): reconstruction_of(config, _precisions_of(precision, own_rules), experts=experts)
        for precision in precisions
    }
    block = rotation_block(config, sweep.pretrained)
    bj.ops.hadamard(sweep.pretrained.model.config.ffn_size, block=block)  # rejects impossible blocks
    sweep.measure_baseline()
    for precision in rounded:
        rules = rules_of_row(first_rules, precision)
        sweep.add(precision, lambda _, rules=rules: bj.quantize_model(sweep.pretrained.model, rules), ROUNDED)
    tokens = calibration_tokens(config, workdir, sweep.pretrained)
    with progress_bar(f"rotating: {config.rotation}"):
        key = jax.random.key(config.seed)
        model = jax.block_until_ready(bj.compress.rotate(sweep.pretrained.model, config.rotation, key=key, block=block))

    def calibrate(precision: bj.Precision | str) -> nnx.Module:
        with progress_bar(f"{precision}: calibrating", model.num_blocks) as advance:
            packed = bj.compress.calibrate(
                model,
                tokens,
                rules_of_row(first_rules, _as_rounded(precision, config)),
                method=method,
                reconstruction=reconstructions[str(precision)],
                learn_spans=config.learn_spans,
                cache_bits=config.cache_bits or None,
                windows_per_step=config.windows_per_step,
                on_block=lambda blocks: advance(blocks, "blocks"),
                store=_store(workdir, precision),
            )
        return with_high_planes(packed, precision.w_bits) if config.rounded_bits else packed

    for precision in precisions:
        sweep.add(precision, calibrate)
        shutil.rmtree(_store(workdir, precision), ignore_errors=True)
    learned = [name for name, each in reconstructions.items() if each is not None]
    sweep.show(
        f"rotation {config.rotation}, {method.algorithm}, {len(tokens)} windows of {config.calibration_text}"
        + (f"; layers of a block learned together: {', '.join(learned)}" if learned else "")
    )
    if config.sample_tokens:
        console.print(f"{precisions[-1]} continues: {config.prompt}", end="", highlight=False, markup=False)
        console.print(sweep.result[MADE][str(precisions[-1])]["sample"], highlight=False, markup=False)


def _as_rounded(precision: bj.Precision | str, config: ConfigDict) -> bj.Precision | str:
    """The precision at which layers are rounded, whose high planes are those of the row.

    Raises:
      ValueError: fewer bits than the row's, or a ternary row.
    """
    if not config.rounded_bits:
        return precision
    if isinstance(precision.w_bits, bj.BipolarFormat) or precision.w_bits > config.rounded_bits:
        raise ValueError(f"{precision} does not have the high planes of config.rounded_bits={config.rounded_bits}")
    return dataclasses.replace(precision, w_bits=config.rounded_bits)


def reconstruction_of(
    config: ConfigDict, precisions: Sequence[bj.Precision], *, experts: bool
) -> bj.compress.Reconstruction | None:
    """How blocks learn whose layers have these precisions, as `config.reconstruction` says; None if they do not.

    With -1 epochs they do if that suits one of the precisions and nothing forbids it.
    """
    asked = dict(config.reconstruction)
    if asked["epochs"] == -1:
        forbidden = experts or config.cache_bits or config.rounded_bits or config.rounding.nested
        suited = [] if forbidden else [each for each in map(bj.compress.Reconstruction.of, precisions) if each]
        asked["epochs"] = max((each.epochs for each in suited), default=0)
    return bj.compress.Reconstruction(**asked) if asked["epochs"] else None


def _precisions_of(row: bj.Precision | str, rules: Sequence[Any]) -> list[bj.Precision]:
    """Of the layers of a row: its own, or those that the rules name."""
    if row != BY_RULES:
        return [row]
    return [bj.Precision.parse(name) for _, name in rules if isinstance(name, str)]


def with_high_planes(model: Transformer, bits: int) -> Transformer:
    """The model with so many high planes of the weights of its decoder layers, as files of it are read with `bits`."""
    model = nnx.clone(model)
    for _, layer in nnx.iter_modules(model.layers):
        if isinstance(layer, bj.nn.Linear):
            layer.kernel = layer.kernel.replace(layer.kernel.get_value().truncate(bits))
            layer.precision = dataclasses.replace(layer.precision, w_bits=bits)
    return model


def rotation_block(config: ConfigDict, pretrained: PretrainedModel) -> int | None:
    """Numbers that R4 mixes, None for the most: as `config.rotation_block` says."""
    if config.rotation_block != -1:
        return config.rotation_block or None
    sizes = pretrained.model.config
    return bj.ops.decode_rotation_block(sizes.ffn_size, gated=gate_activation(sizes.ffn) is not None)


def calibration_tokens(
    config: ConfigDict, workdir: Path, pretrained: PretrainedModel
) -> Int[np.ndarray, "windows length"]:
    """Token ids to calibrate with; written once to the workdir, because a model takes long to write a text itself.

    Raises:
      ValueError: too short a text, or windows of another run.
    """
    path = workdir / _TOKENS_NAME
    shape = config.calibration_windows, config.calibration_length
    if path.is_file():
        tokens = np.load(path)
        if tokens.shape != shape:
            raise ValueError(f"{path} has windows of shape {tokens.shape}, asked for are {shape}: delete it")
        return tokens
    if config.calibration_text == "self":
        with progress_bar("the model writes its calibration text", config.calibration_windows) as advance:
            tokens = written_text(pretrained.model, shape, config.seed, advance)
    else:
        ids = _text_ids(config.calibration_text, pretrained)
        if len(ids) < shape[0] * shape[1]:
            raise ValueError(
                f"{config.calibration_text} has {len(ids)} tokens: {shape[0]} windows of {shape[1]} need "
                f"{shape[0] * shape[1]}; ask for fewer, or give a longer text"
            )
        tokens = np.asarray(ids[: shape[0] * shape[1]], np.int32).reshape(shape)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, tokens)
    return tokens


def written_text(
    model: Transformer, shape: tuple[int, int], seed: int, on_window: Callable[[float], None]
) -> Int[np.ndarray, "windows length"]:
    """Windows that the float model writes: on GPUs in bfloat16 and many at once, which is faster."""
    key = jax.random.key(seed)
    if default_device().platform != "gpu":
        return bj.models.write_windows(model, *shape, key=key, on_window=on_window)
    model = prepare_for_inference(model, jnp.bfloat16)
    return bj.models.write_windows(model, *shape, key=key, windows_per_step=_WRITTEN_AT_ONCE, on_window=on_window)


def _text_ids(name: str, pretrained: PretrainedModel) -> Int[np.ndarray, " tokens"]:
    """Ids of the calibration text, which may be a .npy file of ids. Raises ValueError for one of other numbers."""
    if name.endswith(".npy"):
        ids = np.load(name)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"{name} has {ids.dtype.name} numbers, token ids are integers")
        return ids.reshape(-1)
    return np.asarray(encode(pretrained.tokenizer, load_text_source(name), add_special_tokens=False))


def _store(workdir: Path, precision: bj.Precision | str) -> Path:
    return workdir / f"{precision}.blocks"


def command() -> None:
    """The command line."""
    pin_float_products()
    app.run(main, example="calibrate")


if __name__ == "__main__":
    command()

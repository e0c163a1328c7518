"""Models rounded by qwix (github.com/google/qwix): its PTQ, GPTQ and AWQ, as peers in experiments/compare_methods.py.

qwix's own functions round the matrices, from the statistics of inputs that its calibration collects in the float model.
The rounded numbers go back into our float model, which is scored like every other: no kernel of qwix runs. With 8-bit
activations each product first quantizes its tokens as qwix's PTQ does: to int8, by the largest magnitude of a token.
Needs qwix (pip install 'bipolar_jax[peers]').
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from qwix.contrib import awq_core, gptq_core

import bipolar_jax as bj
from bipolar_jax.compress.block_programs import enter_blocks, float_matrices, run_block
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.nn.compressible import Compressible, layer_at

from ..calibrate import calibration_tokens
from ..support import app
from ..support.precision_sweep import EMBEDDING, MADE, Loaded, Sweep
from ..support.progress import progress_bar
from ..support.workdir import RESULT_NAME, write_json

PEERS = ("ptq", "gptq", "awq")
_SETTINGS = (
    "model",
    "text",
    "windows",
    "window_length",
    "embedding_precision",
    "embedding_calibration",
    "seed",
    "peer",
    "calibration_text",
    "calibration_windows",
    "calibration_length",
)
_DTYPES = {2: "int2", 3: "int3", 4: jnp.int4, 5: "int5", 6: "int6", 7: "int7", 8: jnp.int8}
_GPTQ_BITS = (4, 8)  # its loop has no arrays of qwix's own types
_SCALE_BYTES = 2  # of a bfloat16 model, whose dtype qwix gives scales
_qarray = gptq_core.qarray


def main(config: ConfigDict, workdir: Path, loaded: Loaded | None = None) -> None:
    """Rounds and scores a model; `config` is that of experiments/calibrate.py, with `peer`, one of `PEERS`.

    `loaded` has the config's model and text, if another run has loaded them.

    Writes the sections of result.json that experiments/calibrate.py writes.

    Raises:
      ValueError: another peer; a precision that qwix does not have.
    """
    (peer,) = app.parse_names("peer", config.peer, PEERS)
    precisions = [bj.Precision.parse(text) for text in app.split_names(config.precisions)]
    for precision in precisions:
        bits = _GPTQ_BITS if peer == "gptq" else tuple(_DTYPES)
        if precision.w_bits not in bits or precision.a_bits not in (8, None):
            asked = ", ".join(map(str, bits))
            raise ValueError(f"{precision} is not compared with qwix's {peer}: give {asked} bits of weights, A8 or A16")
    workdir.mkdir(parents=True, exist_ok=True)
    sweep = Sweep.begin(config, workdir, _SETTINGS, loaded=loaded)
    sweep.measure_baseline()
    tokens = calibration_tokens(config, workdir, sweep.pretrained)
    embedding = bj.Precision.parse(config.embedding_precision, config.embedding_calibration or None)
    model = bj.quantize_model(sweep.pretrained.model, [(EMBEDDING, embedding)])

    def rounded(precision: bj.Precision) -> nnx.Module:
        return rounded_model(model, tokens, peer, precision, config.windows_per_step)

    for precision in precisions:
        sweep.add(precision, rounded)
        sweep.result[MADE][str(precision)]["bytes"] = packed_bytes(model, peer, precision)
    write_json(workdir / RESULT_NAME, sweep.result)


def rounded_model(
    model: Compressible, tokens: Int[np.ndarray, "windows length"], peer: str, precision: bj.Precision, step: int
) -> nnx.Module:
    """The model with the layers of its blocks rounded, `step` windows at once."""
    starts = range(0, len(tokens), step)
    carries = [enter_blocks(model, jnp.asarray(tokens[start : start + step]), None) for start in starts]
    blocks = []
    with progress_bar(f"{precision}: qwix {peer}", model.num_blocks) as advance:
        for index in range(model.num_blocks):
            block = model.block(index)
            blocks.append(_rounded_block(model, block, carries, peer, precision))
            carries = [run_block(model, block, carry) for carry in carries]
            advance(index + 1, "blocks")
    return model.with_blocks(blocks)


def _rounded_block(
    model: Compressible, block: nnx.Module, carries: Sequence[Any], peer: str, precision: bj.Precision
) -> nnx.Module:
    rounded = nnx.clone(block)
    for index, sites in enumerate(model.block_sites):
        # Rows are rounded by themselves, so those of all layers with one input are rounded at once.
        matrices = float_matrices(block, sites.names)
        rows = jnp.concatenate([matrix.astype(jnp.float32).T for matrix in matrices])
        products, magnitudes, count = 0, 0, 0
        for carry in () if peer == "ptq" else carries:
            found = _sums(model, block, carry, model.block_sites[index:], rows.shape[1])
            products, magnitudes, count = products + found[0], magnitudes + found[1], count + found[2]
        rows = rounded_rows(rows, products, magnitudes / max(count, 1), peer, precision)
        ends = np.cumsum([matrix.shape[1] for matrix in matrices])[:-1]
        for name, part in zip(sites.names, jnp.split(rows, ends), strict=True):
            layer = layer_at(rounded, name)
            layer.kernel[...] = part.T.reshape(layer.kernel.shape).astype(layer.kernel.dtype)
            if precision.a_bits is not None:
                layer.dot_general = int8_tokens_dot_general
    return rounded


@functools.partial(jax.jit, static_argnames=("remaining", "k"))
def _sums(model, block, carry, remaining, k: int) -> tuple[Float[Array, "k k"], Float[Array, " k"], int]:
    """Sums of x^T x and of |x| over the tokens x that enter the first of the remaining sites; and their number."""
    x, _ = site_inputs(model, block, carry, remaining)
    rows = x.reshape(-1, k).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST), jnp.abs(rows).sum(axis=0), len(rows)


def rounded_rows(
    rows: Float[Array, "n k"],
    products: Float[Array, "k k"] | int,
    magnitudes: Float[Array, " k"] | float,
    peer: str,
    precision: bj.Precision,
) -> Float[Array, "n k"]:
    """Weights as qwix rounds them, dequantized.

    Args:
      rows: weights, an output each.
      products: sum of x^T x over tokens, for GPTQ.
      magnitudes: mean of |x| over tokens, for AWQ.
      peer: one of `PEERS`.
      precision: of weights; each output, or each group of its weights, has a float scale.
    """
    tiles = {} if precision.group_size is None else {1: precision.group_size}
    how = _qarray.HowToQuantize(qtype=_DTYPES[precision.w_bits], channelwise_axes=[0], tiled_axes=tiles)
    if peer == "gptq":
        with jax.numpy_rank_promotion("allow"):  # qwix promotes ranks
            return _qarray.dequantize(gptq_core.quantize_weight(rows, products, how)[0])
    if peer == "awq":
        quantized, scales = awq_core.quantize_weight(rows, magnitudes, how)
        return _qarray.dequantize(quantized) / scales
    return _qarray.dequantize(_qarray.quantize(rows, how))


def int8_tokens_dot_general(lhs, rhs, dimension_numbers, precision=None, **options) -> Array:
    """`jax.lax.dot_general` of tokens that are rounded to int8 first, each by its largest magnitude."""
    contracted = {axis % lhs.ndim for axis in dimension_numbers[0][0]}
    others = [axis for axis in range(lhs.ndim) if axis not in contracted]
    how = _qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=others)
    lhs = _qarray.dequantize(_qarray.quantize(lhs, how)).astype(lhs.dtype)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **options)


def packed_bytes(model: Compressible, peer: str, precision: bj.Precision) -> int:
    """Bytes of the model as qwix would keep it: codes, scales in 16 bits, and all else as it is."""
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    block = nnx.eval_shape(lambda: model.block(0))
    for sites in model.block_sites:
        kernels = [layer_at(block, name).kernel for name in sites.names]
        outputs = [layer_at(block, name).out_features for name in sites.names]
        for kernel, n in zip(kernels, outputs, strict=True):
            size = math.prod(kernel.shape)
            k = size // math.prod(np.atleast_1d(n))
            scales = size // (precision.group_size or k) + (k if peer == "awq" else 0)
            packed = size * precision.w_bits // 8 + scales * _SCALE_BYTES
            whole += model.num_blocks * (packed - size * kernel.dtype.itemsize)
    return int(whole)

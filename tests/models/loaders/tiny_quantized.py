"""Tiny checkpoints in the low-bit formats of Hugging Face, packed by hand, with the weights that they stand for.

Written from the formats' own descriptions and independent of the package: integers become rows of bits.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from tests.support import tiny_checkpoints as tiny

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A layer: weights d (q - z) of [out, in].

    Attributes:
      tensors: as stored, by suffix.
      weight: float32.
    """

    tensors: dict[str, np.ndarray]
    weight: np.ndarray


def dense(rows: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned integers as int32 words without padding: integer i is at bit i * bits of the row."""
    planes = (rows[..., None] >> np.arange(bits) & 1).reshape(len(rows), -1)
    padded = np.pad(planes, ((0, 0), (0, -planes.shape[1] % 32))).astype(np.uint8)
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def aligned(rows: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned integers as int32 words of 32 // bits each."""
    each = 32 // bits
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % each)))
    return np.concatenate([dense(padded[:, i : i + each], bits) for i in range(0, padded.shape[1], each)], axis=1)


def grid(rng: np.random.Generator, n: int, k: int, bits: int, group: int, dtype: Any = np.float16):
    """Random codes [n, k], zeros and scales [n, groups], and the float32 weights, by the definition."""
    groups = -(-k // group)
    codes, zeros = rng.integers(0, 1 << bits, (n, k)), rng.integers(0, 1 << bits, (n, groups))
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * k**-0.5 / (1 << bits)).astype(dtype)
    return codes, zeros, scales


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """scale of the group * (code - zero of the group), float32."""
    return ((codes - zeros[:, group_of]) * scales.astype(np.float64)[:, group_of]).astype(np.float32)


def gptq(rng, n: int, k: int, *, bits: int = 4, group: int = 32, v2: bool = False, order: np.ndarray | None = None):
    """GPTQ's layer; `order` lists the inputs so that those of one group are neighbours (act-order)."""
    codes, zeros, scales = grid(rng, n, k, bits, group)
    group_of = np.arange(k) // group
    if order is not None:
        group_of[order] = np.arange(k) // group
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    tensors = {
        "qweight": dense(codes, bits).T,
        "qzeros": dense(stored.T, bits),
        "scales": scales.T,
        "g_idx": group_of.astype(np.int32),
        "bias": np.zeros(n, np.float16),
    }
    return Quantized(tensors, dequantized(codes, zeros, scales, group_of))


def awq(rng, n: int, k: int, *, group: int = 32):
    """AWQ's layer, version gemm: eight outputs in a word, low nibble first, in the order 0 2 4 6 1 3 5 7."""
    codes, zeros, scales = grid(rng, n, k, 4, group)

    def packed(rows):  # [rows, n]
        shuffled = rows.reshape(len(rows), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(rows.shape)
        return dense(shuffled, 4)

    tensors = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T}
    return Quantized(tensors, dequantized(codes, zeros, scales, np.arange(k) // group))


def compressed(rng, n: int, k: int, *, bits=4, group=None, symmetric=True, packing=dense, order=None, ints=False):
    """A layer of compressed-tensors: packed, or int8 if `ints`; one scale a row without a group."""
    size = k if group is None else group
    codes, zeros, scales = grid(rng, n, k, bits, size, ml_dtypes.bfloat16)
    half = 1 << (bits - 1)
    zeros = np.full_like(zeros, half) if symmetric else zeros
    group_of = np.arange(k) // size
    tensors = {"weight_scale": scales}
    if order is not None:
        group_of[order] = np.arange(k) // size
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    if ints:
        tensors["weight"] = (codes - half).astype(np.int8)
    else:
        tensors |= {"weight_packed": packing(codes, bits), "weight_shape": np.array([n, k], np.int64)}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - half).astype(np.int8) if ints else packing(zeros.T, bits).T
    return Quantized(tensors, dequantized(codes, zeros, scales, group_of))


def bitnet(rng, n: int, k: int, *, divides: bool):
    """BitNet's layer: four outputs, n / 4 apart, in a byte."""
    ternary = rng.integers(-1, 2, (n, k))
    scale = np.array([rng.uniform(0.5, 1.5) * (k**0.5 if divides else k**-0.5)], ml_dtypes.bfloat16)
    quarters = (ternary + 1).reshape(4, n // 4, k)
    packed = sum(quarters[i] << 2 * i for i in range(4)).astype(np.uint8)
    factor = 1 / np.float32(scale[0]) if divides else np.float32(scale[0])
    return Quantized({"weight": packed, "weight_scale": scale}, (ternary * factor).astype(np.float32))


def rows(rng, n: int, k: int, *, exact: bool = False) -> np.ndarray:
    """Random weights, float16 [n, k]; with `exact` the largest magnitudes of rows are 127 times numbers of 4 bits."""
    floats = rng.standard_normal((n, k)) * k**-0.5
    if exact:
        largest = 127 * rng.integers(8, 16, n) / 2**14
        floats *= (largest / np.abs(floats).max(axis=1))[:, None]
        floats[np.arange(n), np.abs(floats).argmax(axis=1)] = largest
    return floats.astype(np.float16)


def bitsandbytes_of(floats: np.ndarray) -> Quantized:
    """A layer of LLM.int8(): rows are rounded to 127ths of their largest magnitude SCB, which is stored.

    The library's reader multiplies q by SCB, then by 1 / 127, and rounds both products, unless `rows` are exact.
    """
    floats = floats.astype(np.float32)
    largest = np.abs(floats).max(axis=1)
    codes = np.rint(floats * (np.float32(127) * (1 / largest))[:, None]).astype(np.int8)
    weight = codes * largest[:, None] * np.float32(1 / 127)
    return Quantized({"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}, weight)


def bitsandbytes(rng, n: int, k: int, *, exact: bool = False) -> Quantized:
    """A layer that bitsandbytes quantized to 8 bits."""
    return bitsandbytes_of(rows(rng, n, k, exact=exact))


def with_experts(model: tiny.Tiny, count: int, per_token: int, ffn: int) -> tiny.Tiny:
    """The checkpoint as a Qwen3-MoE with norms of queries and keys that are ones, and experts in all layers but 0."""
    rng, weights = np.random.default_rng(5), {}

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    for name, array in model.weights.items():
        if ".mlp." not in name or ".0.mlp." in name:
            weights[name] = array
    for layer in range(tiny.LAYERS):
        name = f"model.layers.{layer}."
        weights |= {f"{name}self_attn.{part}_norm.weight": np.ones(tiny.HEAD_DIM, np.float32) for part in "qk"}
        if layer:
            weights[f"{name}mlp.gate.weight"] = matrix(count, tiny.HIDDEN)
            for part, shape in {
                "gate": (ffn, tiny.HIDDEN),
                "up": (ffn, tiny.HIDDEN),
                "down": (tiny.HIDDEN, ffn),
            }.items():
                names = (f"{name}mlp.experts.{expert}.{part}_proj.weight" for expert in range(count))
                weights |= {each: matrix(*shape) for each in names}
    experts = {"num_experts": count, "num_experts_per_tok": per_token, "moe_intermediate_size": ffn}
    return dataclasses.replace(model, arch="qwen3_moe", weights=weights, config=experts | {"mlp_only_layers": [0]})


def write(
    directory: Path, config: dict[str, Any], make, *, float_layers=(), model: tiny.Tiny | None = None, **overrides
) -> tiny.Tiny:
    """Writes a tiny Llama whose linear layers `make(name, n, k)` quantizes; returns the float model of its weights.

    Args:
      directory: to write to.
      config: quantization_config.
      make: a `Quantized` for the name and sizes of a layer.
      float_layers: parts of names of layers that stay floats.
      model: the checkpoint, in place of a Llama.
      overrides: of `tiny.make`.
    """
    model = tiny.make(**overrides) if model is None else model
    weights, stored = dict(model.weights), {}
    for name, array in model.weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEAR) or any(part in module for part in float_layers):
            stored[name] = array
            continue
        layer = make(module, *array.shape)
        weights[name] = layer.weight
        stored |= {f"{module}.{suffix}": np.ascontiguousarray(tensor) for suffix, tensor in layer.tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    fields = tiny.hf_config(model) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(fields))
    tiny.make_tokenizer(model.pre).save(str(directory / "tokenizer.json"))
    safetensors.numpy.save_file(stored, directory / "model.safetensors")
    return dataclasses.replace(model, weights=weights)

"""Decodes a token of each text through all layers: checks what the kernel serves, and lays out its operands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, RMSNorm
from bipolar_jax.kernels.sm90.arithmetic.operands import weight_words
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, PTX_TYPES, TMA_ALIGNMENT, WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import Cache
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import (
    HEAD_NORMS,
    PAIR,
    PRODUCTS,
    WAIT_LIMIT_MS,
    LayersShape,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.prepared_layout import PreparedLayout
from bipolar_jax.kernels.sm90.decode_step.launch import run_layers
from bipolar_jax.kernels.sm90.decode_step.phases import LayersWeights
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights
from bipolar_jax.kernels.sm90.weight_only.config import check_dtype
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarArray, PreparedArray


def decode_layers(
    hidden: Float[Array, "texts hidden"],
    kernels: dict[str, BipolarArray | PreparedArray],
    biases: dict[str, Float[Array, "layers n"] | None],
    norms: dict[str, RMSNorm | LayerNorm],
    activation: Activation,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    lengths: Int[Array, " texts"],
    tables: tuple[Float[Array, "texts half"], Float[Array, "texts half"]] | None,
    slopes: Float[Array, " heads"] | None,
    a_format: BipolarFormat | None,
    *,
    cache_bits: int | None = None,
    spans: Mapping[str, float] | None = None,
    first_layer: int = 0,
    key_rotation: Hadamard | None = None,
    blocks: int | None = None,
    wait_limit_ms: int = WAIT_LIMIT_MS,
    shares_chunks: bool = True,
    timed: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, ...]:
    """All layers of a pre-norm decoder for one new token of each of a few texts.

    Values between products are float32: norms, quantization and residual sums see no other rounding.

    Blocks wait for each other, so all of them must be resident at the same time. Run one such kernel at a time on a
    device. The number of blocks is that of the multiprocessors of the device that holds the cache or, where arrays are
    traced and have none, of the default device. The kernel traps if it runs on a device with fewer, or if a wait
    exceeds its limit: the host gets a CUDA error when it next synchronizes.

    Args:
      hidden: of the new tokens; of more than one text, up to MOST_TEXTS, with prepared weights and no float sums.
      kernels: of the products "qkv", "o", "up" and "down" of all layers, [layers, k, n], of one format and one float
        scale a column; or all of them prepared, with integer groups of one size or without, "up" gated if the
        activation is. Groups may have float scales, of one form (`packing.float_terms`).
      biases: of the same products, or None.
      norms: before attention, "qkv", and before the feed-forward block, "up"; of one kind and epsilon. Also of each
        head of "queries" and "keys", before `tables`, RMSNorms of one epsilon, if both are there.
      keys, values: of the cache: bfloat16 or float16 [layers, texts, kv_heads, capacity, head_dim]; or codes, scales
        and zeros as `models.kv_cache` stores them. They lack the new tokens, and are not written.
      lengths: positions that hold a token, which is the new token's position. If the cache is full, the new token
        does not attend to itself.
      tables: cosines and sines of these positions; None where positions are not rotary.
      slopes: ALiBi's, of key positions; None where there are none.
      a_format: 1 to 8 bits; or None for tokens of 16-bit floats, in the dtype of `hidden`, with prepared weights.
      cache_bits: of the cache's codes, 8 or 4, or None for floats.
      spans: of the tokens of each product, see `BipolarFormat.span`; None is 1 for all.
      first_layer: index in the cache of the first of these layers: the cache may be that of more layers.
      key_rotation: of each head of queries and keys, after `tables`, as one block; cached keys, which are codes, are
        rotated already.
      blocks: thread blocks of the kernel; None takes one for each multiprocessor.
      wait_limit_ms: milliseconds that a block waits for others before the kernel traps. A tool that slows kernels down
        (compute-sanitizer) needs more.
      shares_chunks: whether four heads that have the same keys are attended for by one block where that can be; False
        is for comparison.
      timed: whether warpgroups also store when they reached the steps of a phase; on a device alone.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      float32: the hidden states after all layers, before the final norm, [texts, hidden]; and for every layer the
      tokens' queries, keys and values, one after the other, before rotation, [layers, texts, qkv]. If they are timed,
      also what `cooperative.timeline.split_timeline` divides.

    Raises:
      Unsupported: formats, norms or sizes that differ or that the kernel does not serve; more blocks than
        multiprocessors.
    """
    shape = _shape(hidden, kernels, norms, activation, keys, a_format, cache_bits, blocks, wait_limit_ms, interpret)
    static = {"first_layer": first_layer, "key_rotation": key_rotation}
    shape = dataclasses.replace(_with_spans(shape, spans), **static, shares_chunks=shares_chunks, timed=timed)
    (keys, *key_grids), (values, *value_grids) = keys, values
    weights = LayersWeights(
        {name: _product_weights(kernels[name], biases.get(name), a_format is None) for name in PRODUCTS},
        {name: tuple(_number(leaf.reshape(-1)) for leaf in jax.tree.leaves(norm)) for name, norm in norms.items()},
    )
    half = shape.head_dim // 2
    angles = (shape.texts, half)
    cos, sin = (jnp.ones(angles), jnp.zeros(angles)) if tables is None else tables
    copies = WARPGROUP // shape.head_dim
    cache = Cache(
        keys,
        values,
        lengths.astype(jnp.int32),
        jnp.concatenate([cos, cos] * copies, axis=-1).reshape(-1),
        jnp.concatenate([-sin, sin] * copies, axis=-1).reshape(-1),
        None if slopes is None else slopes.astype(jnp.float32) * math.log2(math.e),
        tuple(key_grids),
        tuple(value_grids),
    )

    # Blocks of concurrent calls would hold each other's multiprocessors: under vmap, calls run one after the other.
    @jax.custom_batching.sequential_vmap
    def run(hidden, weights, cache):
        return run_layers(hidden, weights, cache, shape, interpret=interpret)

    return run(hidden.astype(jnp.float32), weights, cache)


def plan_decode_layers(
    hidden: Float[Array, "texts hidden"],
    kernels: dict[str, BipolarArray | PreparedArray],
    biases: dict[str, Float[Array, "layers n"] | None],
    norms: dict[str, RMSNorm | LayerNorm],
    activation: Activation,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    lengths: Int[Array, " texts"],
    tables: tuple[Float[Array, "texts half"], Float[Array, "texts half"]] | None,
    slopes: Float[Array, " heads"] | None,
    a_format: BipolarFormat | None,
    *,
    cache_bits: int | None = None,
    spans: Mapping[str, float] | None = None,
    first_layer: int = 0,
    key_rotation: Hadamard | None = None,
) -> Plan:
    """What `decode_layers` would run for these operands; raises as it would."""
    del biases, values, lengths, tables, slopes
    shape = _shape(hidden, kernels, norms, activation, keys, a_format, cache_bits, None, WAIT_LIMIT_MS, None)
    shape = dataclasses.replace(_with_spans(shape, spans), first_layer=first_layer, key_rotation=key_rotation)
    planes = shape.prepared is None
    weights = f"{a_format.bits} x {shape.w_format.bits} planes" if planes else _prepared(kernels["qkv"])
    weights += "" if shape.float_token is None else ", float tokens"
    kernel = f"all {shape.num_layers} layers in one persistent kernel of {shape.blocks} blocks, {weights}"
    kernel += _rotation(shape)
    texts = "one sequence" if shape.texts == 1 else f"{shape.texts} sequences"
    return Plan(kernel, f"{texts}: bound by reading weights and cache, and by launches", shape)


def _with_spans(shape: LayersShape, spans: Mapping[str, float] | None) -> LayersShape:
    if spans is None:
        return shape
    return dataclasses.replace(shape, spans=tuple(spans[name] for name in PRODUCTS))


def _rotation(shape: LayersShape) -> str:
    """How the input of down is rotated, in words."""
    rotation, early = shape.activation.rotation, shape.rotated_early
    if rotation is None:
        return ""
    if early == rotation.block:
        return f", {early} numbers each rotated where gate and up are computed"
    return f", {rotation.block} numbers each rotated, {early} where gate and up are computed, then by every block"


def _prepared(kernel: PreparedArray) -> str:
    groups = "" if kernel.terms is None else f", groups of {kernel.group_size}"
    groups += "" if kernel.float_terms is None else f" with float {kernel.float_terms}"
    return f"prepared weights of {kernel.format.name} bits{groups}"


def _shape(
    hidden: Float[Array, "texts hidden"],
    kernels: dict[str, BipolarArray | PreparedArray],
    norms: dict[str, RMSNorm | LayerNorm],
    activation: Activation,
    keys: tuple[Array, ...],
    a_format: BipolarFormat | None,
    cache_bits: int | None,
    blocks: int | None,
    wait_limit_ms: int,
    interpret: plgpu.InterpretGPUParams | None,
) -> LayersShape:
    """The static shape of the kernel. Raises Unsupported as `decode_layers` says."""
    _check_weights(kernels, activation, a_format)
    if a_format is None:
        check_dtype(hidden.dtype)
    keys, *_ = keys
    if cache_bits is None and keys.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"the cache must be bfloat16 or float16, not {keys.dtype}")
    _, texts, kv_heads, capacity, row = keys.shape
    head_dim = row * 2 if cache_bits == 4 else row
    if cache_bits is not None and capacity % TMA_ALIGNMENT:
        raise Unsupported(f"zeros of {capacity} positions are no multiple of {TMA_ALIGNMENT} bytes, which copies take")
    kinds = {name: (type(norm).__name__, norm.eps) for name, norm in norms.items()}
    for one, other in (("qkv", "up"), HEAD_NORMS):
        if kinds.get(one) != kinds.get(other):
            raise Unsupported(
                f"both norms of a layer must be of one kind and epsilon, not {kinds.get(one)} and {kinds.get(other)}"
            )
    if not isinstance(norms.get(HEAD_NORMS[0]), RMSNorm | None):
        raise Unsupported(f"heads of queries and keys are normalized by RMSNorm, not by {kinds[HEAD_NORMS[0]][0]}")
    multiprocessors = _multiprocessors(keys)
    blocks = multiprocessors if blocks is None else blocks
    if interpret is None and blocks > multiprocessors:
        raise Unsupported(
            f"{blocks} blocks wait for each other, more than the device's {multiprocessors} multiprocessors"
        )
    if texts > 1 and interpret is None:
        blocks -= blocks % PAIR
    return LayersShape(
        num_layers=kernels["qkv"].shape[0],
        hidden=hidden.shape[1],
        ffn=kernels["down"].contracted_size,
        heads=kernels["o"].contracted_size // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        a_format=a_format,
        float_token=PTX_TYPES[hidden.dtype.name] if a_format is None else None,
        w_format=kernels["qkv"].format,
        norm="rms" if isinstance(norms["qkv"], RMSNorm) else "layer",
        norm_eps=norms["qkv"].eps,
        head_norm_eps=norms[HEAD_NORMS[0]].eps if HEAD_NORMS[0] in norms else None,
        activation=activation,
        blocks=blocks,
        texts=texts,
        prepared=_layout(kernels["qkv"]),
        cache_bits=cache_bits,
        wait_limit_ms=wait_limit_ms,
    )


def _check_weights(
    kernels: dict[str, BipolarArray | PreparedArray], activation: Activation, a_format: BipolarFormat | None
) -> None:
    """Raises Unsupported unless all weights are of one kind and format."""
    first = kernels["qkv"]
    prepared = isinstance(first, PreparedArray)
    for name, kernel in kernels.items():
        if isinstance(kernel, PreparedArray) != prepared:
            raise Unsupported(f"either all weights are prepared or none, {name} is {kernel} beside {first}")
        if not prepared and kernel.has_integer_groups:
            raise Unsupported(f"{name} has integer groups in bit planes: prepare_for_inference lays them out")
        if prepared and kernel.order != first.order:
            raise Unsupported(f"{name} is laid out for {kernel.order}, the first product for {first.order}")
        same_groups = _groups(kernel) == _groups(first) if prepared else kernel.num_groups == 1
        if kernel.format != first.format or not same_groups:
            raise Unsupported(
                f"weights must have one format and one scale a column, or integer groups of one size: {name} is "
                f"{kernel} beside {first}"
            )
        if prepared and kernel.gated != (name == "up" and activation.gated):
            raise Unsupported(f"{name} is prepared as {'' if kernel.gated else 'not '}gated, beside {activation}")
        scaled = prepared and kernel.float_terms is not None
        if a_format is None and (not prepared or kernel.offset is not None):
            raise Unsupported(
                f"float activations are multiplied with prepared weights that have groups, or no offsets: {name} is "
                f"{kernel}"
            )
        if not scaled and a_format is not None and kernel.contracted_size > kernel.max_contraction(a_format):
            raise Unsupported(f"{name} sums {kernel.contracted_size} products, more than int32 holds for sure")


def _groups(kernel: PreparedArray) -> tuple[int, str | None] | None:
    return None if kernel.terms is None else (kernel.group_size, kernel.float_terms)


def _layout(kernel: BipolarArray | PreparedArray) -> PreparedLayout | None:
    if not isinstance(kernel, PreparedArray):
        return None
    return PreparedLayout(kernel.chunks, kernel.order, kernel.float_terms)


def _multiprocessors(array) -> int:
    """Of the device that holds an array; a traced array has none, and a program for it runs on the default device."""
    concrete = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    devices = array.devices() if concrete else [default_device()]
    return min(getattr(device, "core_count", MULTIPROCESSORS) for device in devices)


def _product_weights(kernel: BipolarArray | PreparedArray, bias, floats: bool) -> ProductWeights:
    def flat(term):
        return None if term is None else term.reshape(-1)

    def by_part(fields):
        return None if fields is None else fields.reshape(fields.shape[0], -1, *fields.shape[3:])

    prepared = isinstance(kernel, PreparedArray)
    scaled = prepared and kernel.float_terms is not None
    return ProductWeights(
        by_part(kernel.words) if prepared else weight_words(kernel, "planes"),
        by_part(kernel.terms) if prepared else None,
        code_sums=None if scaled or floats else flat(kernel.row_sums),
        scale=flat(kernel.scale),
        offset=flat(kernel.offset),
        bias=None if bias is None else _number(flat(bias)),
        number_sums=flat(kernel.number_sums) if scaled and not floats else None,
    )


def _number(array: Array) -> Array:
    """The array in a dtype that the kernel loads."""
    return array if array.dtype in (jnp.bfloat16, jnp.float32) else array.astype(jnp.float32)

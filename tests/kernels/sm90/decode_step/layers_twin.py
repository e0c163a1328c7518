"""Random layers, caches and tokens of texts, and what all layers make of them: a twin written from the definitions."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat, quantize
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, RMSNorm
from bipolar_jax.kernels.sm90.decode_step.api import decode_layers
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import PRODUCTS
from bipolar_jax.models.blocks.alibi import alibi_slopes
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.models.presets import preset
from tests.support import sm90_compile
from tests.support.interpreter import races_found

EPS = 1e-5
SWIGLU = Activation("silu", gated=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Random layers, a cache and a token of each text."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    w_bits: int
    a_bits: int | None  # of bfloat16 if None
    capacity: int
    length: int
    calibration: str | None = "mse"
    bias: bool = False
    gain: float = 1.0
    norm: type = RMSNorm
    activation: Activation = SWIGLU
    positions: str = "rope"
    cache_dtype: type = jnp.bfloat16
    cache_bits: int | None = None
    prepared: bool = False
    group_size: int | None = None
    scales: str = "integer"  # of groups
    head_dim: int = 128
    spans: tuple[float, ...] = (1.0,) * len(PRODUCTS)  # of the tokens of each product
    symmetric: bool = False  # tokens
    rotates_keys: bool = False
    normalizes_heads: bool = False
    texts: int = 1

    @property
    def rotated_by(self) -> int:
        """Numbers of a block of the rotation of down's input; 0 without."""
        return 0 if self.activation.rotation is None else self.activation.rotation.block

    @property
    def lengths(self) -> list[int]:
        """Of each text."""
        return [max(0, self.length - 29 * text) for text in range(self.texts)]

    def operands(self) -> dict:
        rng = np.random.default_rng(self.length)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        context, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "qkv": (self.hidden, context + 2 * kv),
            "o": (context, self.hidden),
            "up": (self.hidden, (2 if self.activation.gated else 1) * self.ffn),
            "down": (self.ffn, self.hidden),
        }
        half = self.head_dim // 2
        angle = np.array(self.lengths)[:, None] * 10000.0 ** (-np.arange(half) / half)
        cache = (self.layers, self.texts, self.kv_heads, self.capacity, self.head_dim)
        return dict(
            hidden=normal(self.texts, self.hidden).astype(jnp.float32 if self.a_bits else jnp.bfloat16),
            kernels={name: self.kernel(name, normal(self.layers, k, n) / np.sqrt(k)) for name, (k, n) in sizes.items()},
            biases={name: normal(self.layers, n) if self.bias else None for name, (_, n) in sizes.items()},
            norms={name: self._norm(normal) for name in ("qkv", "up")} | self._head_norms(normal),
            activation=self.activation,
            keys=self.kept(normal(*cache)),
            values=self.kept(normal(*cache)),
            lengths=jnp.asarray(self.lengths, jnp.int32),
            tables=tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
            if self.positions == "rope"
            else None,
            slopes=jnp.asarray(alibi_slopes(self.heads), jnp.float32) if self.positions == "alibi" else None,
            a_format=BipolarFormat(self.a_bits, symmetric=self.symmetric) if self.a_bits else None,
            cache_bits=self.cache_bits,
            spans=dict(zip(PRODUCTS, self.spans, strict=True)),
            key_rotation=hadamard(self.head_dim) if self.rotates_keys else None,
        )

    def kept(self, heads) -> tuple:
        if self.cache_bits is None:
            return (heads.astype(self.cache_dtype),)
        return tuple(jax.tree.leaves(QuantizedHeads.quantize(heads, self.cache_bits)))

    def kernel(self, name: str, numbers):
        scales = "float" if self.group_size is None else self.scales
        kernel = quantize(
            numbers, self.w_bits, -2, calibration=self.calibration, group_size=self.group_size, scales=scales
        )
        return kernel.prepare(gated=name == "up" and self.activation.gated) if self.prepared else kernel

    def _norm(self, normal):
        gain = self.gain * (1 + 0.1 * normal(self.layers, self.hidden))
        return RMSNorm(gain, EPS) if self.norm is RMSNorm else LayerNorm(gain, normal(self.layers, self.hidden), EPS)

    def _head_norms(self, normal) -> dict[str, RMSNorm]:
        """Whose epsilon matters."""
        names = ("queries", "keys") if self.normalizes_heads else ()
        return {name: RMSNorm(1 + 0.3 * normal(self.layers, self.head_dim), 0.3) for name in names}


@functools.partial(jax.jit, static_argnames=("activation", "length", "a_format", "cache_bits", "spans", "key_rotation"))
def twin(
    hidden, kernels, biases, norms, activation, keys, values, length, tables, slopes, a_format, cache_bits, spans,
    key_rotation,
):  # fmt: skip
    """`decode_layers` of one text in float32, layer by layer; products of what numbers are quantized or rounded to.

    Of the text, `hidden` is a vector, `keys` and `values` have no axis of texts, and `length` is a Python number.
    """
    float_dtype, hidden = hidden.dtype, hidden.astype(jnp.float32)

    def product(x, name, layer):
        w = jax.tree.map(lambda leaf: leaf[layer], kernels[name])
        if a_format is None:
            y = (x.astype(float_dtype).astype(jnp.float32) @ w.values().astype(jnp.float32)) * w.scale[:, 0]
            return y if biases[name] is None else y + biases[name][layer]
        tokens = quantize_tokens(x[None], dataclasses.replace(a_format, span=spans[PRODUCTS.index(name)]))
        steps = a_format.values(tokens.codes)[0] - tokens.zero_value[0]
        values = w.values()  # integers, but of float groups: one bit is a sign, and sums of zero are common
        sums = steps.astype(values.dtype) @ values
        y = w.scale[:, 0] * sums.astype(jnp.float32)
        if w.offset is not None:
            y = y + w.offset[:, 0] * jnp.sum(steps).astype(jnp.float32)
        y = y * tokens.scale
        return y if biases[name] is None else y + biases[name][layer]

    def normalized(x, name, layer):
        return jax.tree.map(lambda leaf: leaf[layer], norms[name])(x)

    def rotated(x, name, layer):
        if name in norms:
            x = normalized(x, name, layer)
        if tables is not None:
            cos, sin = (table[None] for table in tables)
            a, b = jnp.split(x, 2, axis=-1)
            x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return x if key_rotation is None else key_rotation(x)

    def with_new(kept, layer, new):
        cached = jax.tree.map(lambda leaf: leaf[layer], kept)
        if cache_bits is None:
            (cached,) = cached
            cached, new = (x.astype(kept[0].dtype).astype(jnp.float32) for x in (cached, new))
        else:
            cached = QuantizedHeads(*cached, cache_bits).dequantize()
            new = QuantizedHeads.quantize(new, cache_bits).dequantize()
        if length == cached.shape[1]:
            return cached
        return jnp.concatenate([cached[:, :length], new[:, None]], axis=1)

    projections, kv_heads = [], keys[0].shape[1]
    head_dim = keys[0].shape[-1] * (2 if cache_bits == 4 else 1)
    for layer in range(keys[0].shape[0]):
        projected = product(normalized(hidden, "qkv", layer), "qkv", layer)
        projections.append(projected)
        heads = projected.reshape(-1, head_dim)
        q, k, v = heads[: -2 * kv_heads], heads[-2 * kv_heads : -kv_heads], heads[-kv_heads:]
        group = len(q) // kv_heads
        k, v = with_new(keys, layer, rotated(k, "keys", layer)), with_new(values, layer, v)
        scores = jnp.einsum("hgd,hnd->hgn", rotated(q, "queries", layer).reshape(kv_heads, group, -1), k) / np.sqrt(
            head_dim
        )
        if slopes is not None:
            scores += slopes.reshape(kv_heads, group, 1) * jnp.arange(scores.shape[-1], dtype=jnp.float32)[None, None]
        context = jnp.einsum("hgn,hnd->hgd", jax.nn.softmax(scores), v)
        hidden = hidden + product(context.reshape(-1), "o", layer)
        hidden = hidden + product(activation(product(normalized(hidden, "up", layer), "up", layer)), "down", layer)
    return hidden, jnp.stack(projections)


def check_layers(case: Case, blocks: int) -> None:
    """Compares the interpreted kernel with `twin`; the race detector finds nothing."""
    operands = case.operands()
    found = decode_layers(**operands, blocks=blocks, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert not races_found()
    del operands["lengths"]
    for text, length in enumerate(case.lengths):
        of_text = {name: tuple(leaf[:, text] for leaf in operands[name]) for name in ("keys", "values")}
        tables = None if operands["tables"] is None else tuple(table[text] for table in operands["tables"])
        of_text |= {"hidden": operands["hidden"][text], "length": length, "tables": tables, "spans": case.spans}
        for got, expected in zip((found[0][text], found[1][:, text]), twin(**operands | of_text), strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def shapes_of(case: Case) -> dict:
    """`Case.operands`, of zeros that are never made."""
    small = dict(hidden=128, ffn=128, heads=1, kv_heads=1, layers=1, capacity=64, group_size=None)
    operands = dataclasses.replace(case, **small).operands()
    served = dataclasses.replace(case, calibration=None)  # `quantize`'s own, which may give offsets
    context, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
    sizes = {
        "qkv": (case.hidden, context + 2 * kv),
        "o": (context, case.hidden),
        "up": (case.hidden, (2 if case.activation.gated else 1) * case.ffn),
        "down": (case.ffn, case.hidden),
    }
    kernels = {
        name: jax.vmap(functools.partial(served.kernel, name))(jnp.zeros((case.layers, *size)))
        for name, size in sizes.items()
    }
    cache = case.kept(jnp.zeros((case.layers, case.texts, case.kv_heads, case.capacity, case.head_dim)))
    bias = {name: jnp.zeros((case.layers, n), jnp.bfloat16) if case.bias else None for name, (_, n) in sizes.items()}
    gain = jnp.zeros((case.layers, case.hidden), jnp.bfloat16)
    norm = RMSNorm(gain, EPS) if case.norm is RMSNorm else LayerNorm(gain, gain, EPS)
    of_head = RMSNorm(jnp.zeros((case.layers, case.head_dim), jnp.bfloat16), EPS)
    norms = {"qkv": norm, "up": norm} | ({"queries": of_head, "keys": of_head} if case.normalizes_heads else {})
    slopes = jnp.zeros(case.heads) if case.positions == "alibi" else None
    operands |= dict(kernels=kernels, biases=bias, norms=norms, keys=cache, values=cache)
    operands |= dict(hidden=jnp.zeros((case.texts, case.hidden), jnp.bfloat16), slopes=slopes)
    static = ("a_format", "activation", "cache_bits", "spans", "key_rotation")
    return {name: value for name, value in operands.items() if name not in static}


def preset_case(name: str, w_bits: int, a_bits: int | None, **fields) -> Case:
    """The layers of a preset after 1024 of 1088 positions; `fields` are others of the case."""
    config = preset(name)
    sizes = config.num_layers, config.hidden_size, config.ffn_size, config.num_heads, config.num_kv_heads
    of_model = dict(
        bias=config.qkv_bias,
        norm=RMSNorm if config.norm == "rms" else LayerNorm,
        activation=SWIGLU if config.ffn == "swiglu" else Activation(config.ffn),
        positions=config.positions,
        head_dim=config.head_dim,
        normalizes_heads=config.qk_norm,
    )
    return Case(*sizes, w_bits, a_bits, 1088, 1024, **of_model | fields)


def compiled(case: Case) -> sm90_compile.PtxasReport:
    """What ptxas says of the kernel of a case: one, without spills."""
    a_format = None if case.a_bits is None else BipolarFormat(case.a_bits)
    static = {"a_format": a_format, "activation": case.activation, "cache_bits": case.cache_bits}
    operands = jax.eval_shape(lambda: shapes_of(case))
    _, report = sm90_compile.compile_for_h200(lambda operands: decode_layers(**operands, **static), operands)
    assert len(report.registers) == 1, "one kernel"
    assert report.spill_bytes == 0
    return report

"""All layers of a decode step in one kernel, against the same layers one after the other, token by token.

A model decodes two texts at a time layer by layer, and each of them alone in one kernel: the same model and the same
cache, so that only rounding differs. Rounding decides now and then on which side of a grid's boundary a number falls;
the products that follow magnify that, the more the fewer bits activations have. So the first layer's keys and values,
which depend on one quantization, must agree closely for every token, the logits closely for some tokens and within the
noise of quantization for all, and the kernel must return the same bits each time it is called.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import BipolarFormat, Precision
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.decode_step.api import decode_layers
from bipolar_jax.models.blocks.norm import as_prologue, normalize
from bipolar_jax.models.blocks.rope import rope_tables
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.ops import Activation
from tests.gpu.cases.operands import generator
from tests.gpu.trial import Case, Program, Trial, repeated

_TEXTS = 2
_PRECISIONS = ("W1A1", "W2A2", "W3A8", "W4A8", "W8A8")
# Of prepared weights, with the bits of the cache.
_PREPARED = (
    ("W4A8g128i", None),
    ("W4A8g128i", 8),
    ("W3A8g16i", None),
    ("W2A8g64i", 4),
    ("W2A2g64i", None),
    ("W1A8g128i", None),
    ("W6A8g32i", None),
    ("W4A8g128f", None),
    ("W4A8g32f", 8),
    ("W8A8g64f", 4),
    ("W4A8", 8),
    ("W8A8", None),
    ("W8A8", 4),
)
# Of prepared weights and float activations.
_FLOAT_TOKENS = (("W4A16g128", None), ("W4A16g128", 8), ("W3A16g16", None), ("W2A16g64", 4), ("W6A16g32", None))
_CACHE_BITS = (None, 8, 4)
_FIRST_LAYER = 0.05
# Of a token's logits, by bits of the activations, the difference as a share of their norm: if no code changes (8 bits
# have so many that some do), and if codes change (one changed sign may change all that follow). None are floats.
_CLOSE = {1: 1e-3, 2: 1e-3, 8: 0.02, None: 0.02}
_WITHIN_NOISE = {1: math.inf, 2: 0.9, 8: 0.04, None: 0.04}
_CLOSE_SHARE = 0.25  # of the tokens
_WAIT_LIMIT_MS = 100_000  # a sanitizer slows the kernel down
_MAKING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens of two texts of different lengths.

    Attributes:
      config: of the model.
      precision: of all its products.
      cache_bits: 8, 4, or None for bfloat16.
      dtype: of the model. In float32 only float32's rounding differs; bfloat16 is what is served.
      lengths: positions that hold a token, of each text.
      capacity: of the cache.
      blocks: of the kernel, or None for all multiprocessors. With it the cache is not written.
      tokens: decoded one after the other.
      prepared: whether weights are prepared.
    """

    config: TransformerConfig
    precision: str
    cache_bits: int | None
    dtype: Any = jnp.float32
    lengths: tuple[int, int] = (0, 250)
    capacity: int = 320
    blocks: int | None = None
    tokens: int = 6
    prepared: bool = False

    def trial(self) -> Trial:
        model = _model(self.config, self.precision, jnp.dtype(self.dtype), self.prepared)
        cache, rng = self._cache(), generator(*self.lengths)
        ids = rng.integers(0, self.config.vocab_size, (self.tokens, _TEXTS)).astype(np.int32)

        def decode(model, ids, cache):
            return model.decode(ids, cache)

        def decode_in_blocks(model, ids, cache):
            return _decode_in_blocks(model, ids, cache, self.blocks)

        one_kernel = decode if self.blocks is None else decode_in_blocks
        programs = {
            "one kernel": Program(one_kernel, (model, ids[0, :1], _of_text(cache, 0)), kernel="decode_layers"),
            "layer by layer": Program(decode, (model, ids[0], cache)),
        }

        def check(compiled):
            expected, differences = cache, []
            for token in ids:
                before = expected
                logits, expected = jax.device_get(compiled["layer by layer"](model, token, before))
                for text in range(_TEXTS):
                    arguments = (model, token[text : text + 1], _of_text(before, text))
                    found = repeated(lambda arguments=arguments: compiled["one kernel"](*arguments))
                    assert np.isfinite(found[0]).all(), "logits are not finite"
                    differences.append(_difference(found[0][0], logits[text]))
                    if self.blocks is None:
                        self._check_cache(found[1], _of_text(expected, text), before.lengths[text])
            self._check_logits(differences)

        return Trial(programs, check)

    @property
    def _a_bits(self) -> int | None:
        return Precision.parse(self.precision).a_bits

    def _cache(self) -> KVCache:
        """Of random keys and values, beyond the texts' ends, too; NumPy's arrays."""
        config = self.config
        shape = (config.num_layers, _TEXTS, config.num_kv_heads, self.capacity, config.head_dim)
        rng = generator(self.capacity)
        with jax.default_device(jax.devices("cpu")[0]):
            heads = [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in "kv"]
            if self.cache_bits is None:
                heads = [head.astype(jnp.bfloat16) for head in heads]
            else:
                heads = [QuantizedHeads.quantize(head, self.cache_bits) for head in heads]
            return jax.device_get(KVCache(*heads, jnp.asarray(self.lengths, jnp.int32)))

    def _check_cache(self, found: KVCache, expected: KVCache, length: int) -> None:
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        for name in ("keys", "values"):
            for got, wanted in zip(*(jax.tree.leaves(getattr(c, name)) for c in (found, expected)), strict=True):
                others = np.arange(self.capacity) != length
                np.testing.assert_array_equal(got[:, :, :, others], wanted[:, :, :, others])
            if length >= self.capacity:  # a full cache keeps what it has
                continue
            got, wanted = (_numbers(getattr(c, name))[:, 0, :, length] for c in (found, expected))
            for layer in range(self.config.num_layers):
                limit = _FIRST_LAYER if layer == 0 else self._with_cache(max(_FIRST_LAYER, _WITHIN_NOISE[self._a_bits]))
                difference = _difference(got[layer], wanted[layer])
                assert difference <= limit, f"{name} of layer {layer} differ by {difference:.2%}, limit {limit:.0%}"

    def _with_cache(self, noise: float) -> float:
        """A limit on differences, as a share of the norm, behind a cache whose numbers differ by `noise` before it.

        A difference d moves a number across a boundary of the cache's grid with the probability mean(|d|) / step, and
        by one step: sqrt(step * mean(|d|)) in the mean square. Of a normal distribution mean(|d|) is 0.8 of its
        deviation, and the 128 numbers of a head span 5.2 deviations.
        """
        if self.cache_bits is None:
            return noise
        step = 5.2 / (2**self.cache_bits - 1)
        return math.hypot(noise, math.sqrt(step * 0.8 * noise))

    def _check_logits(self, differences: list[float]) -> None:
        if self._a_bits == 1 and self.config.ffn == "gelu":
            return  # far below zero GELU vanishes, and the last bits of its formula decide on the sign
        said = f"logits differ by {', '.join(f'{difference:.2%}' for difference in differences)}"
        noise = self._with_cache(_WITHIN_NOISE[self._a_bits])
        assert max(differences) <= noise, f"{said}: more than {noise:.0%}"
        close = _CLOSE[self._a_bits] if self.dtype == jnp.float32 else noise
        needed = math.ceil(_CLOSE_SHARE * len(differences))
        found = sum(difference <= close for difference in differences)
        assert found >= needed, f"{said}: {found} within {close:.1%}, not {needed}"


@functools.lru_cache(maxsize=3)
def _cached_model(config: TransformerConfig, precision: str, dtype: jnp.dtype, prepared: bool) -> Transformer:
    key = jax.random.key(0)
    model = random_packed(config, Precision.parse(precision), dtype=dtype, key=key, embed_bits=None)
    return prepare_for_inference(model, dtype, layout="tensor_cores") if prepared else join_projections(model)


def _model(config: TransformerConfig, precision: str, dtype: jnp.dtype, prepared: bool) -> Transformer:
    """A model of random weights; cases that differ in their caches share it. One thread at a time makes models."""
    with _MAKING:
        return _cached_model(config, precision, dtype, prepared)


def _decode_in_blocks(model: Transformer, ids, cache: KVCache, blocks: int):
    """`Transformer.decode` of a Llama with rotary positions, by `decode_layers` of so many blocks; logits only."""
    layers = model.layers
    tables = tuple(table[0, 0] for table in rope_tables(model.config, cache.lengths[:, None]))
    products = {
        "qkv": layers.attention.qkv_proj,
        "o": layers.attention.o_proj,
        "up": layers.ffn.gate_up_proj,
        "down": layers.ffn.down_proj,
    }
    hidden, _ = decode_layers(
        model.embed(ids)[0],
        {name: layer.kernel.get_value() for name, layer in products.items()},
        {name: None if layer.bias is None else layer.bias[...] for name, layer in products.items()},
        {"qkv": as_prologue(layers.attention_norm), "up": as_prologue(layers.ffn_norm)},
        Activation("silu", gated=True),
        tuple(jax.tree.leaves(cache.keys)),
        tuple(jax.tree.leaves(cache.values)),
        cache.lengths[0],
        tables,
        None,
        None if products["o"].precision.a_bits is None else BipolarFormat(products["o"].precision.a_bits),
        cache_bits=cache.bits,
        blocks=blocks,
        wait_limit_ms=_WAIT_LIMIT_MS,
        interpret=interpret_params(),
    )
    return (model.logits(normalize(model.final_norm, hidden.astype(model.embed(ids).dtype)[None])),)


def _of_text(cache: KVCache, text: int) -> KVCache:
    """The cache of one of several texts."""
    kept = jax.tree.map(lambda leaf: leaf[:, text : text + 1], (cache.keys, cache.values))
    return KVCache(*kept, cache.lengths[text : text + 1])


def _numbers(kept) -> np.ndarray:
    if not isinstance(kept, QuantizedHeads):
        return np.asarray(kept, np.float64)
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.tree.map(jnp.asarray, kept).dequantize(), np.float64)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference, as a share of the norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def cases(name: str) -> list[Case]:
    """Every precision and cache of one model's shape, two of its layers; and, as served in bfloat16, W4A8 and W8A8."""
    config = _two_layers(name)
    steps = [Step(config, precision, bits) for precision in _PRECISIONS for bits in _CACHE_BITS]
    steps += [Step(config, precision, bits, jnp.bfloat16) for precision, bits in (("W4A8", None), ("W8A8", 4))]
    steps += [Step(config, "W1A2", 8), Step(config, "W2A8", None, lengths=(319, 64))]  # the latter's cache fills up
    return [Case(_name(step), step.trial) for step in steps]


def prepared_cases(name: str) -> list[Case]:
    """Prepared weights, with integer groups, float ones and without."""
    config = _two_layers(name)
    steps = [Step(config, precision, bits, prepared=True) for precision, bits in _PREPARED]
    steps.append(Step(config, "W4A8g128i", None, jnp.bfloat16, prepared=True))
    steps += [Step(config, precision, bits, jnp.bfloat16, prepared=True) for precision, bits in _FLOAT_TOKENS]
    return [Case(_name(step), step.trial) for step in steps]


def _two_layers(name: str) -> TransformerConfig:
    return dataclasses.replace(preset(name), num_layers=2, vocab_size=512, context_length=1024, bos_id=0, eos_ids=(1,))


def _name(step: Step) -> str:
    cache = "bfloat16" if step.cache_bits is None else f"{step.cache_bits} bits"
    model = f"model in {jnp.dtype(step.dtype).name}{', prepared' if step.prepared else ''}"
    return f"{step.precision}, cache of {cache}, {model}, texts of {step.lengths}"


def small() -> dict[str, Case]:
    """One layer and few blocks, which all run at the same time also under a sanitizer."""
    config = TransformerConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=128,
        ffn_size=128,
        context_length=128,
    )
    planes = Step(config, "W2A8", 8, lengths=(0, 40), capacity=64, blocks=2, tokens=1)
    prepared = dataclasses.replace(planes, precision="W4A8g64i", prepared=True)
    within_tile = dataclasses.replace(config, hidden_size=192, num_heads=2, head_dim=64, ffn_size=192)
    heads_of_64 = dataclasses.replace(prepared, config=within_tile, precision="W4A8g128i", blocks=3)
    floats = dataclasses.replace(prepared, precision="W4A16g64", dtype=jnp.bfloat16)
    steps = {"decode step": planes, "decode step, prepared": prepared, "decode step, heads of 64": heads_of_64}
    steps["decode step, float tokens"] = floats
    return {name: Case(name, step.trial) for name, step in steps.items()}

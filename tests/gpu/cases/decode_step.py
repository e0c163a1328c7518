"""All layers of a decode step in one kernel, against the same layers one after the other, token by token.

A model decodes two texts at a time layer by layer, and each of them alone in one kernel: the same model and the same
cache, so that only rounding differs. Rounding decides now and then on which side of a grid's boundary a number falls;
the products that follow magnify that, the more the fewer bits activations have. So the first layer's keys and values,
which depend on one quantization, must agree closely for every token, the logits closely for some tokens and within the
noise of quantization for all (`rounding_noise`), and the kernel must return the same bits each time it is called.

Compiling a case takes about 18 s of one core. So no model runs every precision: each meets both kinds of weights that
it has, with scales and sums of every kind, and every cache; each (precision, cache, dtype, kind of weights) runs in two
models or more. `test_gpu_suite.py` holds that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax import Precision
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.decode_step.api import decode_layers
from bipolar_jax.models.blocks.fused_decode import layer_norms
from bipolar_jax.models.blocks.norm import normalize
from bipolar_jax.models.blocks.rope import rope_tables
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import Activation, hadamard
from tests.gpu.cases.operands import generator
from tests.gpu.rounding_noise import Noise, decode_noise, through_cache, ties_in_cache
from tests.gpu.trial import Case, Program, Trial, repeated

PLANE_MODELS = ("llama-2-7b", "llama-3-8b", "opt-6.7b", "bloom-7b1", "qwen2.5-7b", "smollm2-135m", "smollm2-1.7b")
PREPARED_MODELS = ("llama-3-8b", "qwen2.5-7b", "smollm2-135m", "smollm2-1.7b", "qwen3-1.7b")
_TEXTS = 2
_PRECISIONS = ("W1A1", "W2A2", "W3A8", "W4A8", "W8A8")
# Of prepared weights, with the bits of the cache: integer groups, float groups, one scale a column.
_PREPARED = (
    (
        ("W4A8g128i", None),
        ("W4A8g128i", 8),
        ("W3A8g16i", None),
        ("W2A8g64i", 4),
        ("W2A2g64i", None),
        ("W1A8g128i", None),
        ("W6A8g32i", None),
    ),
    (("W4A8g128f", None), ("W4A8g32f", 8), ("W8A8g64f", 4)),
    (("W4A8", 8), ("W8A8s", None), ("W8A8", 4)),
)
# Of prepared weights and float activations: integer groups, float groups.
_FLOAT_TOKENS = (("W4A16g128", None), ("W4A16g128", 8), ("W3A16g16", None), ("W2A16g64", 4), ("W6A16g32", None))
_SCALED_FLOAT_TOKENS = (("W4A16g128f", 8), ("W4A16g32f", None))
_CACHE_BITS = (None, 8, 4)
_FIRST_LAYER = 0.05
# Of a token's logits, by bits of the activations, the difference as a share of their norm: if no code changes (8 bits
# have so many that some do), and of few bits if codes change (one changed sign may change all that follow). None are
# floats.
_CLOSE = {1: 1e-3, 2: 1e-3, 8: 0.02, None: 0.02}
_WITHIN_NOISE = {1: math.inf, 2: 0.9}
_MARGIN = 1.5  # a token's noise over the predicted one, which is a mean
_CLOSE_SHARE = 0.25  # of the tokens
_ONE_RUN, _TWO_RUNS = (range(2),), (range(1), range(1, 2))
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
      at_once: whether the kernel decodes both texts in one call; then the cache is not written.
      runs: of layers: each is a kernel by itself, which reads its layers of the cache.
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
    at_once: bool = False
    runs: tuple[range, ...] = _ONE_RUN

    @property
    def name(self) -> str:
        cache = "bfloat16" if self.cache_bits is None else f"{self.cache_bits} bits"
        model = f"model in {jnp.dtype(self.dtype).name}{', prepared' if self.prepared else ''}"
        rotation = "" if self.config.rotation is None else f", rotated by {self.config.rotation.ffn.block}"
        runs = "" if len(self.runs) == 1 else f", {len(self.runs)} runs of layers"
        at_once = " at once" if self.at_once else ""
        return f"{self.precision}, cache of {cache}, {model}{rotation}{runs}, texts of {self.lengths}{at_once}"

    def trial(self) -> Trial:
        model = _model(self.config, self.precision, jnp.dtype(self.dtype), self.prepared)
        model = model if len(self.runs) == 1 else model.with_runs(self.runs)
        cache, rng = self._cache(), generator(*self.lengths)
        ids = rng.integers(0, self.config.vocab_size, (self.tokens, _TEXTS)).astype(np.int32)

        def decode(model, ids, cache):
            return model.decode(ids, cache)

        def decode_in_blocks(model, ids, cache):
            return _decode_in_blocks(model, ids, cache, self.blocks)

        writes = self.blocks is None and not self.at_once
        operands = (ids[0], cache) if self.at_once else (ids[0, :1], _of_text(cache, 0))
        programs = {
            "one kernel": Program(decode if writes else decode_in_blocks, (model, *operands), kernel="decode_layers"),
            "layer by layer": Program(decode, (model, ids[0], cache)),
        }

        def check(compiled):
            expected, differences = cache, []
            for token in ids:
                before = expected
                logits, expected = jax.device_get(compiled["layer by layer"](model, token, before))
                for text in range(1 if self.at_once else _TEXTS):
                    texts = slice(0, _TEXTS) if self.at_once else slice(text, text + 1)
                    arguments = (model, token[texts], before if self.at_once else _of_text(before, text))
                    found = repeated(lambda arguments=arguments: compiled["one kernel"](*arguments))
                    assert np.isfinite(found[0]).all(), "logits are not finite"
                    differences += [_difference(*pair) for pair in zip(found[0], logits[texts], strict=True)]
                    if writes:
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
            lengths, rotation = jnp.asarray(self.lengths, jnp.int32), config.key_rotation(self.cache_bits)
            return jax.device_get(KVCache(*heads, lengths, rotation))

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
                limit, difference = self._cached_limit(layer), _difference(got[layer], wanted[layer])
                assert difference <= limit, f"{name} of layer {layer} differ by {difference:.2%}, limit {limit:.0%}"

    def _cached_limit(self, layer: int) -> float:
        """Of a layer's new keys and values in the cache; those of the first layer depend on one quantization."""
        if layer == 0:
            precision = Precision.parse(self.precision)
            return math.hypot(_FIRST_LAYER, ties_in_cache(precision, self.config.hidden_size, self.cache_bits))
        noise = _WITHIN_NOISE.get(self._a_bits) or self._noise(lambda noise: noise.projections[layer])
        return through_cache(max(_FIRST_LAYER, noise), self.cache_bits)

    def _logits_limit(self) -> float:
        few_bits = _WITHIN_NOISE.get(self._a_bits)
        return through_cache(few_bits, self.cache_bits) if few_bits else self._noise(lambda noise: noise.logits)

    def _noise(self, of: Callable[[Noise], float]) -> float:
        """The predicted noise of the noisier text, with a margin.

        Also of a model in float32, whose rounding changes few codes: one changed code is the smallest noise behind a
        quantization, and the layers after it make that as large as bfloat16's.
        """
        arguments = self.config, self._a_bits, jnp.bfloat16, self.cache_bits
        return _MARGIN * max(of(decode_noise(*arguments, length)) for length in self.lengths)

    def _check_logits(self, differences: list[float]) -> None:
        if self._a_bits == 1 and self.config.ffn == "gelu":
            return  # far below zero GELU vanishes, and the last bits of its formula decide on the sign
        said = f"logits differ by {', '.join(f'{difference:.2%}' for difference in differences)}"
        noise = self._logits_limit()
        assert max(differences) <= noise, f"{said}: more than {noise:.1%}"
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


def _decode_in_blocks(model: Transformer, ids, cache: KVCache, blocks: int | None):
    """`Transformer.decode` of a Llama with rotary positions, by `decode_layers` of so many blocks; logits only."""
    layers = model.layers
    tables = tuple(table[:, 0] for table in rope_tables(model.config, cache.lengths[:, None]))
    products = {
        "qkv": layers.attention.qkv_proj,
        "o": layers.attention.o_proj,
        "up": layers.ffn.gate_up_proj,
        "down": layers.ffn.down_proj,
    }
    hidden, _ = decode_layers(
        model.embed(ids),
        {name: layer.kernel.get_value() for name, layer in products.items()},
        {name: None if layer.bias is None else layer.bias[...] for name, layer in products.items()},
        layer_norms(layers),
        Activation("silu", gated=True, rotation=layers.ffn.rotation),
        tuple(jax.tree.leaves(cache.keys)),
        tuple(jax.tree.leaves(cache.values)),
        cache.lengths,
        tables,
        None,
        products["o"].precision.a_format,
        cache_bits=cache.bits,
        key_rotation=cache.key_rotation,
        blocks=blocks,
        wait_limit_ms=_WAIT_LIMIT_MS,
        interpret=interpret_params(),
    )
    return (model.logits(normalize(model.final_norm, hidden.astype(model.embed(ids).dtype))),)


def _of_text(cache: KVCache, text: int) -> KVCache:
    """The cache of one of several texts."""
    kept = jax.tree.map(lambda leaf: leaf[:, text : text + 1], (cache.keys, cache.values))
    return KVCache(*kept, cache.lengths[text : text + 1], cache.key_rotation)


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
    """Weights as planes: of one model's shape, two of its layers."""
    return [Case(step.name, step.trial) for step in plane_steps(name)]


def prepared_cases(name: str) -> list[Case]:
    """Prepared weights, with integer groups, float ones and without; and float activations."""
    return [Case(step.name, step.trial) for step in prepared_steps(name)]


def plane_steps(name: str) -> list[Step]:
    """Every precision with a cache, in turns; one as served in bfloat16, maybe rotated; W1A2 or a full cache."""
    config, turn = _two_layers(name), PLANE_MODELS.index(name)
    steps = [Step(config, precision, _CACHE_BITS[(at + turn) % 3]) for at, precision in enumerate(_PRECISIONS)]
    served = _rotated(config, turn) if turn % 4 < 2 else config
    steps.append(Step(served, *(("W4A8", None), ("W8A8", 4))[turn % 2], jnp.bfloat16))
    steps.append((Step(config, "W2A8", None, lengths=(319, 64)), Step(config, "W1A2", 8))[turn % 2])
    steps[-1] = dataclasses.replace(steps[-1], runs=_TWO_RUNS if turn == 1 else _ONE_RUN)
    return steps


def prepared_steps(name: str) -> list[Step]:
    """Of each kind of groups every second or third precision, in turns; and as served in bfloat16, some rotated."""
    config, turn = _two_layers(name), PREPARED_MODELS.index(name)
    chosen = [kind[at] for kind in _PREPARED for at in range(turn % 2, len(kind), 2)]
    steps = [Step(config, precision, bits, prepared=True) for precision, bits in chosen]
    served = [("W4A8g128i", None), *(_FLOAT_TOKENS[(at + turn) % len(_FLOAT_TOKENS)] for at in (0, 2))]
    served.append(_SCALED_FLOAT_TOKENS[turn % len(_SCALED_FLOAT_TOKENS)])
    configs = [_rotated(config, turn) if at % 2 == turn % 2 else config for at in range(len(served))]
    if config.positions == "rope" and config.ffn == "swiglu":
        precision, bits = (("W4A8g128i", None), ("W2A8g64i", 4))[turn % 2]
        steps.append(Step(config, precision, bits, prepared=True, at_once=True))
    runs = [_TWO_RUNS if (at, turn % 3) == (0, 0) else _ONE_RUN for at in range(len(served))]
    return steps + [
        Step(config, precision, bits, jnp.bfloat16, prepared=True, runs=runs)
        for config, (precision, bits), runs in zip(configs, served, runs, strict=True)
    ]


def _two_layers(name: str) -> TransformerConfig:
    return dataclasses.replace(preset(name), num_layers=2, vocab_size=512, context_length=1024, bos_id=0, eos_ids=(1,))


def _rotated(config: TransformerConfig, turn: int) -> TransformerConfig:
    """The input of down is rotated in blocks of 256 to 16, if these divide it; keys are in a 4-bit cache."""
    block = min(256 >> turn % 5, config.ffn_size & -config.ffn_size)
    rotation = Rotation(ffn=hadamard(config.ffn_size, block=block), keys=hadamard(config.head_dim))
    return dataclasses.replace(config, rotation=rotation)


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
    heads_of_64 = dataclasses.replace(
        prepared, config=_rotated(within_tile, 0), precision="W4A8g128i", cache_bits=4, blocks=3
    )
    floats = dataclasses.replace(prepared, precision="W4A16g64", dtype=jnp.bfloat16)
    steps = {"decode step": planes, "decode step, prepared": prepared, "decode step, heads of 64": heads_of_64}
    steps["decode step, float tokens"] = floats
    steps["decode step, float tokens and groups"] = dataclasses.replace(floats, precision="W4A16g64f")
    normalized = dataclasses.replace(config, qk_norm=True)
    steps["decode step, norms of heads"] = dataclasses.replace(prepared, config=normalized)
    steps["decode step, two texts"] = dataclasses.replace(prepared, at_once=True)
    return {name: Case(name, step.trial) for name, step in steps.items()}

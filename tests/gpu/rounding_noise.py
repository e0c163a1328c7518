"""How far apart two ways of computing a decode step are that round floats at different places: a prediction.

Differences are norms as shares of the norm of what is computed, of a model of `random_packed`: its activations are
random numbers of known deviations, and so are their differences. Two effects count. Each rounding of a number to 16
bits adds its error, where only one of the ways rounds. And quantizing tells numbers apart that lie on two sides of a
boundary between codes, which makes small differences larger:

- A difference d crosses a boundary with the probability |d| / step, and is then a step: mean square step * mean(|d|).
- Beyond half a step nearly all numbers have an error of their own on either way: d^2 + 2 * step^2 / 12.

What enters the first layer is exact. So the residual stream keeps its share of noise small as long as the embedding is
most of it: one of deviation 1 dilutes what layers add. A tied embedding has the deviation hidden_size^-0.5, next to
nothing, and the output of attention to many random tokens is little more; there the noise of the layers is the noise of
the model, several times as much, and grows with the width: the more numbers a token has, the larger is its largest,
which sets the step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from bipolar_jax import Precision
from bipolar_jax.models.config import TransformerConfig

# Of a normal distribution: mean of |d| as a share of the deviation. What a gate has multiplied has longer tails.
_MEAN_OF_NORMAL, _MEAN_OF_GATED = 0.8, 0.6
# The numbers of a head span so many deviations; 64 or 128 of them.
_SPAN_OF_HEAD = 5.2


@dataclasses.dataclass(frozen=True)
class Noise:
    """Differences in a step.

    Attributes:
      projections: of queries, keys and values before they are cached, by layer.
      logits: of the logits.
    """

    projections: tuple[float, ...]
    logits: float


def decode_noise(config: TransformerConfig, a_bits: int | None, dtype, cache_bits: int | None, length: int) -> Noise:
    """The prediction for one token after `length` others whose keys and values are random.

    Args:
      config: of the model.
      a_bits: bits of quantized activations; None where they stay floats.
      dtype: that one way rounds to, and the other does not.
      cache_bits: of the cache.
      length: positions of the cache before the token.
    """
    rounding = _rounding(dtype)
    token = _quantizer(a_bits, math.sqrt(2 * math.log(config.hidden_size)), _MEAN_OF_NORMAL, rounding)
    gated = config.ffn == "swiglu"
    # The largest of so many normal numbers; and of products of two, found by drawing them.
    largest = 1.3 * math.log(config.ffn_size) if gated else 1.4 * math.sqrt(2 * math.log(config.ffn_size))
    ffn_token = _quantizer(a_bits, largest, _MEAN_OF_GATED if gated else _MEAN_OF_NORMAL, rounding)

    summed = (2 * config.num_layers) ** -0.5  # deviation of what a layer adds, per deviation of what it multiplies
    # Scores of normal deviation: the mean of `length` values with softmax's weights is the mean of length / e.
    context_size = min(1.0, math.sqrt(math.e / (length + 1)))
    activated_size = 0.6 if gated else 0.7

    stream = config.hidden_size**-0.5 if config.tie_embeddings and not config.embed_norm else 1.0
    stream_noise = 0.0 if not config.embed_norm else rounding
    projections = []
    for _ in range(config.num_layers):
        projected = math.hypot(token(stream_noise / stream), rounding)
        projections.append(projected)
        # Softmax's weights differ as the scores do; the cache's grid moves the new token alone, one of length + 1.
        of_cache = through_cache(projected, cache_bits) / ((length + 1) * context_size)
        # Layer by layer, tensor cores take softmax's weights of a cache of floats as 16-bit floats: an error of every
        # term, which the sum has too.
        weights = rounding if cache_bits is None and length else 0.0
        context = math.hypot(projected, of_cache, weights, rounding, rounding)
        added = context_size * summed
        stream, stream_noise = _add(stream, stream_noise, added, added * token(context), rounding)
        up = math.hypot(token(stream_noise / stream), rounding)
        activated = math.hypot(math.sqrt(2) * up if gated else up, rounding)
        added = activated_size * summed
        stream, stream_noise = _add(stream, stream_noise, added, added * ffn_token(activated), rounding)
    return Noise(tuple(projections), math.hypot(stream_noise / stream, rounding, rounding))


def through_cache(noise: float, bits: int | None) -> float:
    """The difference of keys or values behind a cache's grid, of those that differ by `noise` before it."""
    if bits is None:
        return noise
    return math.hypot(noise, math.sqrt(cache_step(bits) * _MEAN_OF_NORMAL * noise))


def ties_in_cache(precision: Precision, k: int, bits: int | None) -> float:
    """The difference where values of a first layer lie on a boundary of the cache's grid, and any last bit decides.

    Values are integers of one parity times a scale, and the grid lies between two of them, R apart: one bit of weights
    and of activations has so few that up to levels / R of the values are halfway between two codes. All of them differ
    by a step then.
    """
    if bits is None or precision.a_bits is None:
        return 0.0
    mean_square = math.prod((4**n - 1) / 3 for n in (precision.w_bits, precision.a_bits))
    values = _SPAN_OF_HEAD * math.sqrt(k * mean_square) / 2
    return cache_step(bits) * math.sqrt(min(0.5, (2**bits - 1) / values))


def cache_step(bits: int) -> float:
    """Step of a cache's grid, in deviations of the numbers of a head."""
    return _SPAN_OF_HEAD / (2**bits - 1)


def _rounding(dtype) -> float:
    """Deviation of the error of rounding to a dtype, as a share of the number, which is uniform between two powers."""
    return float(jnp.finfo(dtype).eps) / math.sqrt(12) / math.sqrt(7 / 3)


def _quantizer(bits: int | None, largest: float, mean: float, rounding: float) -> Callable[[float], float]:
    """Difference behind a grid from minus to plus the largest number, by that before it; floats are rounded."""
    if bits is None:
        return lambda noise: math.hypot(noise, rounding)
    step = 2 * largest / (2**bits - 1)

    def quantized(noise: float) -> float:
        if noise < step / 2:
            return max(noise, math.sqrt(step * mean * noise))
        return math.hypot(noise, step / math.sqrt(6))

    return quantized


def _add(size: float, noise: float, added: float, added_noise: float, rounding: float) -> tuple[float, float]:
    """Deviation and absolute noise of a sum that is rounded, of what has been rounded before it is added."""
    size = math.hypot(size, added)
    return size, math.hypot(noise, added_noise, rounding * added, rounding * size)

"""Float scales of groups, laid out in the order in which threads read them beside the fields of `packing.fields`.

A number is S * (u + Z) + o, with u the code, S twice the scale of a value, and Z = -W / 2 where the codes themselves
have no other zero. A row's terms are stored for every chunk of K in which no group ends, gcd(group_size, STAGE)
elements, in one of four forms:

- "scales": S as float32. Without offsets; Z is -W / 2.
- "zeros": S and Z as float16. Where both are exact: S is a float16, every offset a multiple of half of S, as in GPTQ,
  AWQ, and GGUF's Q4_0 and Q8_0; o is 0.
- "minimums": S and the number of code 0 as float16, o is that + S * W / 2. Where both are exact: GGUF's Q4_1 and Q5_1.
- "offsets": S and o as float32, for all others; Z is -W / 2.

A chunk of a part has one vector of 32 words, or two: words 4 r + 2 b + p belong to row 16 b + 8 p + r of the part, so
that the lanes 4 r to 4 r + 3 load the terms of their four rows at once.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers
from bipolar_jax.packing.fields import PART_ROWS, PARTS, STAGE

FloatTerms = Literal["scales", "zeros", "minimums", "offsets"]
# Multiples of 1/2 up to this are exact in float16, and so are their products with a float16 in float32.
_LARGEST_ZERO = 1024


def vectors_of(kind: FloatTerms) -> int:
    """Vectors of PART_ROWS words of one chunk and part."""
    return 2 if kind == "offsets" else 1


def narrowest_terms(
    scale: Float[Array, "*batch n groups"], offset: Float[Array, "*batch n groups"] | None, fmt: BipolarFormat
) -> FloatTerms:
    """The smallest form that is exact; "offsets" of traced arrays that have offsets."""
    if offset is None:
        return "scales"
    if isinstance(scale, jax.core.Tracer) or isinstance(offset, jax.core.Tracer):
        return "offsets"
    if bool(_has_zeros(scale, offset, fmt)):
        return "zeros"
    return "minimums" if bool(_has_minimums(scale, offset, fmt)) else "offsets"


def shared_terms(arrays: list[BipolarNumbers]) -> FloatTerms:
    """The smallest form that is exact for all these arrays with float scales of groups, of one format."""
    kinds = {narrowest_terms(w.scale, w.offset, w.format) for w in arrays}
    if len(kinds) > 1:
        offsets = [0 * w.scale if w.offset is None else w.offset for w in arrays]
        kinds = {narrowest_terms(w.scale, offset, w.format) for w, offset in zip(arrays, offsets, strict=True)}
    return "offsets" if len(kinds) > 1 else kinds.pop()


@functools.partial(jax.jit, static_argnums=2)
def _has_zeros(scale: Array, offset: Array, fmt: BipolarFormat) -> Array:
    scale = 2 * scale
    zero = _zeros(scale, offset, fmt)
    exact = (scale == scale.astype(jnp.float16).astype(jnp.float32)) & (jnp.abs(zero) <= _LARGEST_ZERO)
    return jnp.all(exact & (scale * (zero + fmt.max_value / 2) == offset))


@functools.partial(jax.jit, static_argnums=2)
def _has_minimums(scale: Array, offset: Array, fmt: BipolarFormat) -> Array:
    scale = 2 * scale
    minimum = (offset - scale * (fmt.max_value / 2)).astype(jnp.float16).astype(jnp.float32)
    exact = scale == scale.astype(jnp.float16).astype(jnp.float32)
    return jnp.all(exact & (minimum + scale * (fmt.max_value / 2) == offset))


def _zeros(scale: Array, offset: Array, fmt: BipolarFormat) -> Array:
    """Z of S and o: the nearest multiple of 1/2."""
    ratio = jnp.where(scale == 0, 0, offset / jnp.where(scale == 0, 1, scale))
    return jnp.round(2 * (ratio - fmt.max_value / 2)) / 2


def pack_float_terms(
    scale: Float[Array, "rows groups"],
    offset: Float[Array, "rows groups"] | None,
    fmt: BipolarFormat,
    kind: FloatTerms,
    group_size: int,
    stages: int,
) -> UInt32[Array, "tiles parts stages chunks words"]:
    """Words of the terms of every chunk; rows are filled up to whole tiles.

    Args:
      scale, offset: of values, as `BipolarArray` has them.
      fmt: of the codes.
      kind: the form, see `narrowest_terms`.
      group_size: elements of K.
      stages: of K.
    """
    scale = 2 * scale
    if kind == "scales":
        vectors = [_as_words(scale)]
    elif kind in ("zeros", "minimums"):
        offset = jnp.zeros_like(scale) if offset is None else offset
        second = _zeros(scale, offset, fmt) if kind == "zeros" else offset - scale * (fmt.max_value / 2)
        pairs = jnp.stack([scale, second], axis=-1).astype(jnp.float16)
        vectors = [jax.lax.bitcast_convert_type(pairs, jnp.uint32)]
    else:
        vectors = [_as_words(scale), _as_words(jnp.zeros_like(scale) if offset is None else offset)]
    chunk = math.gcd(group_size, STAGE)
    chunks = STAGE // chunk
    group = np.minimum(np.arange(stages * chunks) * chunk // group_size, scale.shape[1] - 1)
    words = jnp.stack([words[:, group] for words in vectors])
    # Vector, tile, block, part, half of the part's rows, lane / 4, stage, chunk.
    words = words.reshape(len(vectors), -1, 2, PARTS, 2, 8, stages, chunks).transpose(1, 3, 6, 7, 0, 5, 2, 4)
    return words.reshape(-1, PARTS, stages, chunks, len(vectors) * PART_ROWS)


def part_float_terms(
    terms: UInt32[Array, "*batch chunks words"], fmt: BipolarFormat, kind: FloatTerms
) -> tuple[Float[Array, "*batch part_rows chunks"], Float[Array, "*batch part_rows chunks"], Array | None]:
    """S, Z and o of parts of a stage, float32, o None of "scales" and "zeros": row 16 b + 8 p + r."""
    *batch, chunks, _ = terms.shape
    words = terms.reshape(*batch, chunks, vectors_of(kind), 8, 2, 2)  # lane / 4, block, half of the rows
    axes = [len(batch) + axis for axis in (1, 3, 4, 2, 0)]
    words = words.transpose(*range(len(batch)), *axes).reshape(*batch, vectors_of(kind), PART_ROWS, chunks)
    first = words[..., 0, :, :]
    if kind in ("zeros", "minimums"):
        pair = jax.lax.bitcast_convert_type(first, jnp.float16).astype(jnp.float32)
        scale, second = pair[..., 0], pair[..., 1]
        if kind == "zeros":
            return scale, second, None
        return scale, jnp.full_like(scale, -fmt.max_value / 2), second + scale * (fmt.max_value / 2)
    scale = jax.lax.bitcast_convert_type(first, jnp.float32)
    zero = jnp.full(scale.shape, -fmt.max_value / 2, jnp.float32)
    return scale, zero, jax.lax.bitcast_convert_type(words[..., 1, :, :], jnp.float32) if kind == "offsets" else None


def unpack_float_terms(
    terms: UInt32[Array, "tiles parts stages chunks words"],
    fmt: BipolarFormat,
    kind: FloatTerms,
    group_size: int,
    k: int,
) -> tuple[Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """Scales and offsets of values of whole tiles: the inverse of `pack_float_terms`, with 0 for no offset."""
    tiles, _, stages, chunks, _ = terms.shape
    group_starts = np.arange(-(-k // group_size)) * group_size // (STAGE // chunks)

    def of_rows(part: Array) -> Array:
        rows = part.reshape(tiles, PARTS, stages, 2, PART_ROWS // 2, chunks).transpose(0, 3, 1, 4, 2, 5)
        return rows.reshape(tiles * STAGE, stages * chunks)[:, group_starts]

    scale, zero, offset = part_float_terms(terms, fmt, kind)
    offset = scale * (zero + fmt.max_value / 2) if offset is None else offset
    return of_rows(scale / 2), of_rows(offset)


def _as_words(numbers: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.uint32)

"""Prepared weights with float scales of groups, expanded to rows of 16-bit floats in memory, for prompts.

As `expand_floats`, but a value 2 u - W becomes scale * value + offset in float32, rounded once: one pass reads the
fields and writes 16 bits a weight, and no pass of XLA scales what another has written.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALVES, Expansion
from bipolar_jax.kernels.sm90.weight_prep.expand_floats import FloatRows, expanded_rows
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import STAGE

# A byte below this word's bytes 1 to 3 is a float32: this number plus the byte.
_FLOAT_WORD, _FLOAT_BASE = 0x4B000000, 8388608.0
_PAIR = 0x5410  # of pick_bytes: the low halves of both words


def expand_scaled(
    w: PreparedArray,
    scale: Float[Array, "n groups"],
    offset: Float[Array, "n groups"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "n padded_k"]:
    """scale * value + offset as float16, by column; from K on to whole stages any finite numbers.

    Args:
      w: [k, n], with float scales of groups; gated or not.
      scale, offset: float32, in place of those of w, so that numbers fit float16.
      interpret: parameters of interpret mode, for tests on a CPU.
    """
    rows = ScaledRows(
        ScaledExpansion(w.format, w.chunks),
        w.row_sums.shape[-2],
        w.words.shape[2],
        w.gated,
        w.natural_order,
        w.group_size,
        scale.shape[1],
    )
    return expanded_rows(rows, [w.words, scale, offset], w.words.shape[0], jnp.dtype(jnp.float16), interpret)


@dataclasses.dataclass(frozen=True)
class ScaledExpansion:
    """How fields become float16 numbers; as `FloatExpansion`, with terms that `ScaledRows` loads.

    Attributes:
      format: of the codes.
      chunks: of a stage.
    """

    format: BipolarFormat
    chunks: int

    @property
    def fields(self) -> Expansion:
        """How registers of codes are made of fields."""
        return Expansion(self.format.bits, self.chunks)

    def values(self, codes: Value, terms: tuple[Value, Value]) -> list[Value]:
        """The two pairs of numbers of a register of codes."""
        scale, offset = terms
        numbers = []
        for byte in range(4):
            code = ptx.as_float(ptx.pick_bytes(codes, ptx.int32(_FLOAT_WORD), 0x7440 + byte))
            code = ptx.subtract(code, ptx.float32(_FLOAT_BASE))
            value = ptx.fma(code, ptx.float32(2.0), ptx.float32(-float(self.format.max_value)))
            numbers.append(ptx.rounded("f16", ptx.fma(scale, value, offset)))
        return [ptx.pick_bytes(*numbers[i : i + 2], _PAIR) for i in (0, 2)]


@dataclasses.dataclass(frozen=True)
class ScaledRows(FloatRows):
    """`FloatRows` with float32 scales and offsets.

    Attributes:
      group_size: elements of K that share a scale.
      groups: of a column.
    """

    group_size: int
    groups: int

    kernel_name: ClassVar[str] = "expand_scaled"

    def load_terms(
        self, terms: list[Value], tile: Value, stage: Value, warp: Value, lane: Value, half: int
    ) -> list[list[tuple[Value, Value]]]:
        """Scale and offset of a lane's four rows, for each chunk of half a stage, or the one around it.

        Args:
          terms: scale and offset, [n, groups] in global memory.
          tile, stage, warp, lane, half: what the thread expands.
        """
        count = max(1, self.expansion.chunks // HALVES)
        columns = [ptx.smaller(column, self.n - 1) for column in self.columns(tile, warp, lane)]
        starts = [ptx.times(column, self.groups) for column in columns]
        loaded = []
        for chunk in range(count):
            element = ptx.plus(ptx.times(stage, STAGE), STAGE // HALVES * half + STAGE // HALVES // count * chunk)
            group = ptx.smaller(ptx.divided(element, self.group_size), self.groups - 1)
            places = [ptx.plus(start, group) for start in starts]
            loaded.append([tuple(_number_at(term, place) for term in terms) for place in places])
        return loaded

    def numbers(self, values: Int[Array, "count stage"], terms, row, count: int, stage) -> Float[Array, "count stage"]:
        """The numbers of `count` columns from `row` on, in jnp."""
        group = jnp.minimum((stage * STAGE + lax.iota(jnp.int32, STAGE)) // self.group_size, self.groups - 1)
        scale, offset = (jnp.take(term[pl.ds(row, count), :], group, axis=1) for term in terms)
        return scale * values.astype(jnp.float32) + offset


def _number_at(term: Value, place: Value) -> Value:
    (word,) = ptx.load(ptx.advance_far(ptx.pointer(term, ptx.GLOBAL), place, 4), 1)
    return ptx.as_float(word)

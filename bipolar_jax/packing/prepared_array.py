"""`PreparedArray`: bipolar numbers in the order in which threads of a GPU expand them to bytes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers, register_numbers, static_field
from bipolar_jax.packing.fields import (
    CHUNK_WORDS,
    GROUP_UNIT,
    PARTS,
    STAGE,
    TILE_ROWS,
    WORDS_PER_VECTOR,
    in_natural_order,
    pack_fields,
    pack_terms,
    unpack_fields,
    unpack_terms,
)
from bipolar_jax.quantize.integer_groups import IntegerGroups

_HALF_TILE = TILE_ROWS // 2


@register_numbers
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class PreparedArray(BipolarNumbers):
    """A `BipolarArray` laid out for int8 tensor cores, made by its `prepare`; files do not take it.

    Always:

    - `words` and `terms` are the codes and integer groups as `packing.fields` lays them out; both are 0 beyond row n,
      and codes beyond `contracted_size`;
    - all else is as in `BipolarArray`. Scales of groups are integers: float ones have no such layout.

    Attributes:
      words: fields of the codes.
      terms: s and o + 128 of every chunk of K; None without groups.
      gated: whether the rows are gates followed by as many values, as a gated activation takes them. Then a tile has 64
        gates and their values.
    """

    words: UInt32[Array, "*batch tiles parts stages bits vector_words"]
    terms: UInt32[Array, "*batch tiles parts stages chunks chunk_words"] | None
    scale: Float[Array, "*batch n scales"]
    row_sums: Int[Array, "*batch n scales"]
    format: BipolarFormat = static_field()  # noqa: RUF009 - a field
    contracted_size: int = static_field()
    axis: int = static_field()
    group_size: int | None = static_field()
    gated: bool = static_field()
    offset: Float[Array, "*batch n scales"] | None = None

    @property
    def groups(self) -> IntegerGroups | None:
        """As in `BipolarArray`; computed."""
        if self.terms is None:
            return None
        return IntegerGroups(*_over_batch(self._unpacked_terms, 5)(self.terms))

    @property
    def has_integer_groups(self) -> bool:
        """As in `BipolarArray`."""
        return self.terms is not None

    @property
    def chunks(self) -> int:
        """Chunks of a stage that have terms of their own; 0 without groups."""
        return 0 if self.terms is None else self.terms.shape[-2]

    @property
    def natural_order(self) -> bool:
        """Whether the tokens' bytes must be in their natural order."""
        return in_natural_order(self.group_size if self.terms is not None else None)

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""
        return _over_batch(self._unpacked_codes, 5)(self.words)

    def check(self) -> None:
        """Raises ValueError if the shapes of the leaves do not fit each other and the static attributes."""
        *batch, n, _ = self.row_sums.shape
        tiles, stages = _tiles(n, self.gated), -(-self.contracted_size // STAGE)
        wanted = {"words": (*batch, tiles, PARTS, stages, self.bits, WORDS_PER_VECTOR)}
        if self.terms is not None:
            wanted["terms"] = (*batch, tiles, PARTS, stages, self.chunks, CHUNK_WORDS)
        wrong = [
            f"{name} {tuple(getattr(self, name).shape)} instead of {shape}"
            for name, shape in wanted.items()
            if tuple(getattr(self, name).shape) != shape
        ]
        wrong = wrong or self._misshaped((*batch, n))
        if wrong:
            raise ValueError(
                f"inconsistent PreparedArray of contracted size {self.contracted_size}: {', '.join(wrong)}"
            )

    def in_order_of_tiles(self) -> PreparedArray:
        """The array whose columns are the tiles' rows, one after the other, as one that is not gated.

        Of a gated array these are 64 gates, their 64 values and so on; columns of zeros fill up the last tile. See
        `columns_in_order`.
        """
        scale, row_sums, offset = (
            None if rows is None else self.rows_in_order_of_tiles(rows)
            for rows in (self.scale, self.row_sums, self.offset)
        )
        return dataclasses.replace(self, scale=scale, row_sums=row_sums, offset=offset, gated=False)

    def rows_in_order_of_tiles(self, rows: Shaped[Array, "*batch n size"]) -> Shaped[Array, "*batch tile_rows size"]:
        """Numbers of each column as `in_order_of_tiles` has them."""
        return _over_batch(functools.partial(_in_tiles, gated=self.gated), 2)(rows)

    def columns_in_order(self, product: Shaped[Array, "*rows tile_rows"]) -> Shaped[Array, "*rows n"]:
        """The columns of this array out of those of a product with `in_order_of_tiles`."""
        rows, n = product.shape[:-1], self.row_sums.shape[-2]
        if not self.gated:
            return product[..., :n]
        halves = product.reshape(*rows, -1, 2, _HALF_TILE).swapaxes(-3, -2).reshape(*rows, 2, -1)
        return halves[..., : n // 2].reshape(*rows, n)

    def _stored_groups(self) -> None:
        return None

    def _unpacked_codes(self, words: Array) -> Array:
        codes = unpack_fields(words, self.natural_order)
        return _out_of_tiles(codes, self.row_sums.shape[-2], self.gated)[:, : self.contracted_size]

    def _unpacked_terms(self, terms: Array) -> tuple[Array, Array]:
        n, gated = self.row_sums.shape[-2], self.gated
        scale, offset = unpack_terms(terms, self.group_size, self.contracted_size)
        return _out_of_tiles(scale, n, gated), _out_of_tiles(offset, n, gated)


def check_preparable(w: Any, gated: bool) -> None:
    """Raises ValueError unless the array has a layout as a `PreparedArray`."""
    if w.groups is None and w.num_groups > 1:
        raise ValueError(
            f"float scales of groups of {w.group_size} elements cannot be prepared: "
            'quantize with scales="integer", or with one scale a column'
        )
    if w.groups is not None and w.group_size % GROUP_UNIT:
        raise ValueError(f"groups of a multiple of {GROUP_UNIT} elements can be prepared, not of {w.group_size}")
    if gated and w.row_sums.shape[-2] % 2:
        raise ValueError(f"gates and as many values are an even number of columns, not {w.row_sums.shape[-2]}")


def prepared_leaves(w: Any, gated: bool) -> tuple[Array, Array | None]:
    """`words` and `terms` of a `BipolarArray`."""
    natural, bits = in_natural_order(w.group_size if w.groups is not None else None), w.bits

    def words_of(codes: Array) -> Array:
        codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % STAGE)))
        return pack_fields(_in_tiles(codes, gated), bits, natural)

    words = _over_batch(words_of, 2)(w.codes())
    if w.groups is None:
        return words, None
    stages, group_size = words.shape[-3], w.group_size

    def terms_of(scale: Array, offset: Array) -> Array:
        # Rows that fill up a tile have s = 0 and o + 128 = 0.
        offset = _in_tiles(offset.astype(jnp.int16) + 128, gated) - 128
        return pack_terms(_in_tiles(scale, gated), offset.astype(jnp.int8), group_size, stages)

    return words, _over_batch(terms_of, 2)(w.groups.scale, w.groups.offset)


def _tiles(n: int, gated: bool) -> int:
    return -(-(n // 2) // _HALF_TILE) if gated else -(-n // TILE_ROWS)


def _in_tiles(rows: Array, gated: bool) -> Array:
    """Rows filled up to whole tiles with zeros; gated, 64 gates and their 64 values in turn."""
    if not gated:
        return jnp.pad(rows, ((0, -rows.shape[0] % TILE_ROWS), (0, 0)))
    half = rows.shape[0] // 2
    rows = jnp.pad(rows.reshape(2, half, -1), ((0, 0), (0, -half % _HALF_TILE), (0, 0)))
    return rows.reshape(2, -1, _HALF_TILE, rows.shape[-1]).swapaxes(0, 1).reshape(-1, rows.shape[-1])


def _out_of_tiles(rows: Array, n: int, gated: bool) -> Array:
    """The inverse of `_in_tiles`."""
    if not gated:
        return rows[:n]
    halves = rows.reshape(-1, 2, _HALF_TILE, rows.shape[-1]).swapaxes(0, 1).reshape(2, -1, rows.shape[-1])
    return halves[:, : n // 2].reshape(n, -1)


def _over_batch(function: Any, ndim: int) -> Any:
    """The function of arrays with `ndim` axes, mapped over the axes before them."""

    def mapped(*arrays):
        mapped_function = function
        for _ in range(arrays[0].ndim - ndim):
            mapped_function = jax.vmap(mapped_function)
        return mapped_function(*arrays)

    return mapped

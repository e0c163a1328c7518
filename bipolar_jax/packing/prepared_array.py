"""`PreparedArray`: bipolar numbers in the order in which threads of a GPU expand them to bytes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers, register_numbers, static_field
from bipolar_jax.packing.fields import (
    GROUP_UNIT,
    PARTS,
    STAGE,
    TILE_ROWS,
    WORDS_PER_VECTOR,
    TokenOrder,
    order_of_groups,
    pack_fields,
    pack_terms,
    row_codes,
    row_terms,
    unpack_fields,
    unpack_terms,
)
from bipolar_jax.packing.float_terms import (
    BLOCK_TERMS,
    FloatTerms,
    pack_block_terms,
    pack_float_terms,
    terms_shape,
    unpack_float_terms,
)
from bipolar_jax.packing.unpacked_array import UnpackedArray
from bipolar_jax.quantize.groups import along_last, group_lengths, split_groups, spread_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from bipolar_jax.quantize.rounding import from_grid

_HALF_TILE = TILE_ROWS // 2


@register_numbers
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class PreparedArray(BipolarNumbers):
    """A `BipolarArray` laid out for tensor cores, made by its `prepare`; files do not take it.

    Always:

    - `words` and `terms` are the codes and integer groups as `packing.fields` lays them out; both are 0 beyond row n,
      and codes beyond `contracted_size`;
    - with integer groups, or without groups, all else is as in `BipolarArray`;
    - with float scales of groups (`float_terms`), `terms` hold the scales and offsets as `packing.float_terms` says,
      number[..., n, k] is `scale[..., n, 0]`, a power of two, times theirs, `row_sums[..., n, 0]` is the sum of all
      codes of row n, and `number_sums[..., n, 0]` that of its numbers, divided by `scale`;
    - scales of groups are negative only of a `BlockScaledArray` whose terms are kept as integers of blocks: codes are
      then the integers that the file stores.

    Attributes:
      words: fields of the codes.
      terms: of every chunk of K: s and o + 128, or float scales; None without groups.
      gated: whether the rows are gates followed by as many values, as a gated activation takes them. Then a tile has 64
        gates and their values.
      float_terms: the form of float scales of groups; None if there are none.
      number_sums: of float scales of groups: what a token's zero is multiplied by.
      for_floats: whether 16-bit float tokens are multiplied as they lie in memory; else bytes are, and others are
        brought into order first.
    """

    words: UInt32[Array, "*batch tiles parts stages bits vector_words"]
    terms: UInt32[Array, "*batch tiles parts stages vectors vector_words"] | None
    scale: Float[Array, "*batch n scales"]
    row_sums: Int[Array, "*batch n scales"]
    format: BipolarFormat = static_field()  # noqa: RUF009 - a field
    contracted_size: int = static_field()
    axis: int = static_field()
    group_size: int | None = static_field()
    gated: bool = static_field()
    offset: Float[Array, "*batch n scales"] | None = None
    number_sums: Float[Array, "*batch n 1"] | None = None
    float_terms: FloatTerms | None = static_field(default=None)  # noqa: RUF009 - a field
    for_floats: bool = static_field(default=False)

    @property
    def groups(self) -> IntegerGroups | None:
        """As in `BipolarArray`; computed."""
        if not self.has_integer_groups:
            return None
        return IntegerGroups(*_over_batch(self._unpacked_terms, 5)(self.terms))

    @property
    def has_integer_groups(self) -> bool:
        """As in `BipolarArray`."""
        return self.terms is not None and self.float_terms is None

    @property
    def scale_group_size(self) -> int | None:
        """As in `BipolarArray`; None with float scales of groups, which are below one of the column."""
        return None if self.float_terms is not None else super().scale_group_size

    @property
    def chunks(self) -> int:
        """Chunks of a stage that have terms of their own; 0 without groups."""
        return 0 if self.terms is None else STAGE // math.gcd(self.group_size, STAGE)

    @property
    def order(self) -> TokenOrder:
        """The order of tokens that positions follow."""
        return "floats" if self.for_floats else order_of_groups(self.group_size if self.terms is not None else None)

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""
        return _over_batch(self._unpacked_codes, 5)(self.words)

    def unpack(self) -> UnpackedArray:
        """As `BipolarArray.unpack`; float scales of groups are those of the array that this one is made of."""
        scale, offset, row_sums = self.scale, self.offset, self.row_sums
        group_size = self.scale_group_size
        if self.float_terms is None:
            signed = self.signed_rows()
        else:
            (scale, offset), group_size = (term * self.scale for term in self.group_scales()), self.group_size
            codes = self.codes()
            if self.float_terms in BLOCK_TERMS:
                negative = spread_groups(scale < 0, self.contracted_size, group_size)
                codes, scale = jnp.where(negative, self.format.max_value - codes, codes), jnp.abs(scale)
            signed = self.format.signed_codes(codes)
            row_sums = jnp.sum(split_groups(codes, group_size), axis=-1, dtype=jnp.int32)
        signed = jnp.moveaxis(split_groups(signed, group_size), -2, -3)
        static = (self.format, self.contracted_size, self.axis, self.group_size)
        return UnpackedArray(signed, scale, offset, row_sums, *static, self.groups)

    def with_scales(self) -> BipolarNumbers:
        """See `BipolarNumbers.with_scales`."""
        return self if self.float_terms is None else self.unpack()

    def values(self) -> Float[Array, "*shape"] | Int[Array, "*shape"]:
        """As in `BipolarArray`; with float scales of groups the numbers divided by the column's scale, float32."""
        if self.float_terms is None:
            return super().values()
        return dataclasses.replace(self, scale=jnp.ones_like(self.scale)).dequantize()

    def dequantize(self) -> Float[Array, "*shape"]:
        """As in `BipolarArray`."""
        return super().dequantize() if self.float_terms is None else self.with_scales().dequantize()

    def value_sums(self) -> Int[Array, "*batch n scales"]:
        """As in `BipolarArray`."""
        return super().value_sums() if self.float_terms is None else self.with_scales().value_sums()

    def group_scales(self) -> tuple[Float[Array, "*batch n groups"], Float[Array, "*batch n groups"]]:
        """Float scales and offsets of groups, below `scale`, without which an array must not be asked."""
        return _over_batch(self._unpacked_float_terms, 5)(self.terms)

    def rows_at(self, ids: Int[Array, " ids"]) -> Float[Array, "ids k"]:
        """The numbers of some rows, float32, of one array packed along the last axis; reads four times their words.

        Args:
          ids: from 0 to n - 1, int32.

        Raises:
          ValueError: float scales of groups, or an array that is gated or packed along the other axis.
        """
        if self.float_terms is not None or self.gated or self.axis != -1:
            raise ValueError(f"{self} has no rows to look up: look them up in the array that it is made of")
        k, scale = self.contracted_size, jnp.take(self.scale, ids, axis=0)
        codes = row_codes(self.words, ids, self.order)[:, :k]
        if self.terms is None:
            offset = None if self.offset is None else jnp.take(self.offset, ids, axis=0)
            return from_grid(codes, self.format, scale, offset, self.group_size)
        groups = IntegerGroups(*row_terms(self.terms, ids, self.group_size, k))
        return scale * groups.values(codes, self.group_size).astype(jnp.float32)

    def check(self) -> None:
        """Raises ValueError if the shapes of the leaves do not fit each other and the static attributes."""
        *batch, n, _ = self.row_sums.shape
        tiles, stages = _tiles(n, self.gated), -(-self.contracted_size // STAGE)
        wanted = {"words": (*batch, tiles, PARTS, stages, self.bits, WORDS_PER_VECTOR)}
        if self.terms is not None:
            wanted["terms"] = (*batch, tiles, PARTS, stages, *terms_shape(self.float_terms, self.chunks))
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
        names = ("scale", "row_sums", "offset", "number_sums")
        rows = {name: getattr(self, name) for name in names}
        in_order = {name: None if rows is None else self.rows_in_order_of_tiles(rows) for name, rows in rows.items()}
        return dataclasses.replace(self, **in_order, gated=False)

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
        codes = unpack_fields(words, self.order)
        return _out_of_tiles(codes, self.row_sums.shape[-2], self.gated)[:, : self.contracted_size]

    def _unpacked_terms(self, terms: Array) -> tuple[Array, Array]:
        n, gated = self.row_sums.shape[-2], self.gated
        scale, offset = unpack_terms(terms, self.group_size, self.contracted_size)
        return _out_of_tiles(scale, n, gated), _out_of_tiles(offset, n, gated)

    def _unpacked_float_terms(self, terms: Array) -> tuple[Array, Array]:
        n, gated, static = self.row_sums.shape[-2], self.gated, (self.group_size, self.contracted_size)
        scale, offset = unpack_float_terms(terms, self.format, self.float_terms, *static)
        return _out_of_tiles(scale, n, gated), _out_of_tiles(offset, n, gated)


def check_preparable(w: Any, gated: bool) -> None:
    """Raises ValueError unless the array has a layout as a `PreparedArray`."""
    if has_terms(w) and w.group_size % GROUP_UNIT:
        raise ValueError(f"groups of a multiple of {GROUP_UNIT} elements can be prepared, not of {w.group_size}")
    if gated and w.row_sums.shape[-2] % 2:
        raise ValueError(f"gates and as many values are an even number of columns, not {w.row_sums.shape[-2]}")


def has_float_groups(w: Any) -> bool:
    """Whether groups of a `BipolarArray` have float scales of their own."""
    return w.groups is None and w.num_groups > 1


def has_terms(w: Any) -> bool:
    """Whether a `BipolarArray` has groups whose terms are laid out."""
    return w.groups is not None or has_float_groups(w)


def prepared(w: Any, gated: bool, float_terms: FloatTerms | None, for_floats: bool) -> PreparedArray:
    """A `BipolarArray` laid out; `float_terms` is the form of float scales of groups, if it has such.

    It is one of BLOCK_TERMS if w is a `BlockScaledArray`.
    """
    static = (w.format, w.contracted_size, w.axis, w.group_size, gated)
    codes = w.stored() if float_terms in BLOCK_TERMS else w.codes()
    order = "floats" if for_floats else order_of_groups(w.group_size if has_terms(w) else None)
    factor = jnp.float32(1)
    if float_terms == "offsets":
        factor = _power_of_two_above(w.scale * w.format.max_value, w.offset)
        offset = None if w.offset is None else w.offset / factor
        w = dataclasses.replace(w, scale=w.scale / factor, offset=offset)
    words, terms = _prepared_leaves(w, codes, gated, float_terms, order)
    if float_terms is None:
        return PreparedArray(words, terms, w.scale, w.row_sums, *static, w.offset, for_floats=for_floats)
    lengths = along_last(group_lengths(w.contracted_size, w.group_size), w.row_sums.ndim)
    sums = w.scale * w.value_sums().astype(jnp.float32)
    sums = sums if w.offset is None else sums + w.offset * lengths.astype(jnp.float32)
    number_sums = jnp.sum(sums, axis=-1, keepdims=True)
    code_sums = jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32)
    scale = jnp.broadcast_to(factor, number_sums.shape)
    return PreparedArray(words, terms, scale, code_sums, *static, None, number_sums, float_terms, for_floats)


def _power_of_two_above(
    scale: Float[Array, "*batch n groups"], offset: Float[Array, "*batch n groups"] | None
) -> Float[Array, "*batch n 1"]:
    """Of each column the power of two above its largest scale and offset, at most 2^126: of both divided by it.

    Scales 2^-126 times as large as their column's largest become 0.
    """
    largest = jnp.max(jnp.abs(scale), axis=-1, keepdims=True)
    if offset is not None:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(offset), axis=-1, keepdims=True))
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -126, 126))


def _prepared_leaves(
    w: Any, codes: Array, gated: bool, float_terms: FloatTerms | None, order: TokenOrder
) -> tuple[Array, Array | None]:
    """`words` of codes, and `terms` of a `BipolarArray` or a `BlockScaledArray`."""
    bits = w.bits

    def words_of(codes: Array) -> Array:
        codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % STAGE)))
        return pack_fields(_in_tiles(codes, gated), bits, order)

    words = _over_batch(words_of, 2)(codes)
    if not has_terms(w):
        return words, None
    stages, group_size = words.shape[-3], w.group_size

    if float_terms in BLOCK_TERMS:
        leaves = [w.block_scale, w.block_minimum, w.group_scales, w.group_minimums]

        def block_terms_of(*rows: Array) -> Array:
            in_tiles = iter([_in_tiles(each, gated) for each in rows])
            of_rows = [None if leaf is None else next(in_tiles) for leaf in leaves]
            return pack_block_terms(*of_rows, float_terms, (w.form.block_size, group_size), stages)

        return words, _over_batch(block_terms_of, 2)(*[leaf for leaf in leaves if leaf is not None])

    def float_terms_of(scale: Array, *offset: Array) -> Array:
        scale, *offset = (_in_tiles(rows, gated) for rows in (scale, *offset))
        return pack_float_terms(scale, *(offset or [None]), w.format, float_terms, group_size, stages)

    if float_terms is not None:
        offset = [] if w.offset is None else [w.offset]
        return words, _over_batch(float_terms_of, 2)(w.scale, *offset)

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

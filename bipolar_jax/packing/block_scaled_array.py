"""`BlockScaledArray`, bit planes with the scales of GGUF's formats: float16 for blocks, integers below them for groups.

Float scales, offsets and row sums of groups of 16 or 32 take 3 to 6 bits a weight, these 0.1 to 1. Products with planes
take the float scales, which `with_scales` makes in their program. Kernels of prepared weights read the integers of
groups themselves (`float_terms`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_array import BipolarArray
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers, register_numbers, static_field
from bipolar_jax.packing.fields import STAGE
from bipolar_jax.packing.float_terms import BlockTerms, FloatTerms
from bipolar_jax.packing.plane_sums import plane_sums
from bipolar_jax.packing.prepared_array import PreparedArray, check_preparable, prepared
from bipolar_jax.packing.unpacked_array import UnpackedArray
from bipolar_jax.packing.words import num_words, unpack_codes
from bipolar_jax.quantize.groups import num_groups, spread_groups

_PREPARED_GROUPS = (16, 32, 64)  # of which an even number makes a stage


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """How numbers follow from codes and scales; see `BlockScaledArray`.

    Attributes:
      block_size: elements along k that share a float16 scale, a multiple of the group size.
      zero: the stored integer, times `factor`, that stands for the minimum, or for 0 where there is none.
      factor: of stored integers: 2 where they are signs (1 bit), else 1.
      minimum: whether groups have a minimum.
      group_scales: the integers below the blocks' scales: "int8"; "uint8", of scales and minimums up to 63; or
        "nibbles", a byte with the scale in the low half and the minimum in the high one; None if groups are blocks.
    """

    block_size: int
    zero: int
    factor: int = 1
    minimum: bool = False
    group_scales: str | None = None

    @property
    def has_group_minimums(self) -> bool:
        """Whether minimums of groups are integers with bytes of their own."""
        return self.minimum and self.group_scales in ("int8", "uint8")

    def prepared_terms(self, fmt: BipolarFormat, group_size: int) -> BlockTerms | None:
        """The form in which kernels read the integers of groups; None if they read float scales instead."""
        if self.block_size % STAGE or group_size not in _PREPARED_GROUPS or self.factor != 1:
            return None
        forms = {
            ("int8", (fmt.max_value + 1) // 2, False): "block_scales",
            ("uint8", 0, True): "block_minimums",
            ("nibbles", 0, True): "block_nibbles",
        }
        return forms.get((self.group_scales, self.zero, self.minimum))

    def shift(self, fmt: BipolarFormat) -> float:
        """Offset of a group without minimum, per step: factor * W / 2 - zero."""
        return self.factor * fmt.max_value / 2 - self.zero


@register_numbers
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class BlockScaledArray(BipolarNumbers):
    """An array of bipolar numbers whose scales are stored as a GGUF file has them.

    Always, with g the group of k and b the block of g:

    - step[..., n, g] = block_scale[..., n, b] * group_scales[..., n, g], and likewise minimum; a factor that is None is
      1, a minimum 0. Both products are exact in float32;
    - number[..., n, k] = step[..., n, g] * (factor * q[..., n, k] - zero) + minimum[..., n, g], which is rounded once,
      to float32; q, the integer that the file stores, is the code where the step is not negative, and else W - code:
      planes of groups with a negative step are complemented, so that scales of values are positive;
    - planes, `axis` and `group_size` are those of a `BipolarArray`; `scale`, `offset` and `row_sums` are computed.

    Attributes:
      planes: bit planes, low plane first.
      block_scale, block_minimum: of blocks, float16, of either sign; block_minimum is None without minimums.
      group_scales, group_minimums: integers of groups; None as `form` says.
      format: the grid.
      contracted_size: k, without padding.
      axis: position of k in `shape`, -1 or -2.
      group_size: elements along k that share a step.
      form: what else is static.
    """

    planes: UInt32[Array, "*batch planes n words"]
    block_scale: Float[Array, "*batch n blocks"]
    block_minimum: Float[Array, "*batch n blocks"] | None
    group_scales: Integer[Array, "*batch n groups"] | None
    group_minimums: Integer[Array, "*batch n groups"] | None
    format: BipolarFormat = static_field()  # noqa: RUF009 - a field
    contracted_size: int = static_field()
    axis: int = static_field()
    group_size: int = static_field()
    form: BlockForm = static_field()  # noqa: RUF009 - a field

    groups = None  # integer groups below one float32 scale of a row, which `to_integer_groups` of `with_scales` makes

    @property
    def scale(self) -> Float[Array, "*batch n groups"]:
        """Number per unit of value, float32."""
        return jnp.abs(self._steps()) * (self.form.factor / 2)

    @property
    def offset(self) -> Float[Array, "*batch n groups"] | None:
        """Number that the value 0 stands for, rounded to float32; None if all are 0."""
        shift = self.form.shift(self.format)
        minimums = self._minimums()
        if minimums is None:
            return None if shift == 0 else self._steps() * shift
        return minimums + self._steps() * shift

    @property
    def row_sums(self) -> Int[Array, "*batch n groups"]:
        """Sums of codes, counted from the planes."""
        return plane_sums(self.planes, self.format, self.contracted_size, self.group_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        *batch, _, n, _ = self.planes.shape
        return (*batch, *((self.contracted_size, n) if self.axis == -2 else (n, self.contracted_size)))

    @property
    def ndim(self) -> int:
        """Number of axes of `shape`."""
        return len(self.planes.shape) - 1

    def __repr__(self) -> str:
        form = f"{self.format.name}, group_size={self.group_size}, blocks of {self.form.block_size}"
        if not hasattr(self.planes, "shape"):  # a tree_map has put other objects in the leaves, such as shardings
            return f"BlockScaledArray({form})"
        return f"BlockScaledArray(shape={self.shape}, bits={form})"

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""
        return unpack_codes(self.planes, self.format, self.contracted_size)

    @property
    def prepared_terms(self) -> BlockTerms | None:
        """See `BlockForm.prepared_terms`."""
        return self.form.prepared_terms(self.format, self.group_size)

    def stored(self) -> UInt8[Array, "*batch n k"]:
        """The integers of the file, whose steps have either sign."""
        codes = self.codes()
        negative = spread_groups(self._steps() < 0, self.contracted_size, self.group_size)
        return jnp.where(negative, jnp.uint8(self.format.max_value) - codes, codes)

    def dequantize(self) -> Float[Array, "*shape"]:
        """The numbers, float32, exactly as the format defines them, in `shape`."""
        return _dequantize(self)

    def with_scales(self) -> BipolarArray:
        """The same planes with float32 scales and offsets, and row sums.

        Numbers are those of `dequantize` but for the rounding of offsets, which float32 holds exactly unless a minimum
        is some hundred times as large as its group's step.
        """
        return _with_scales(self)

    def unpack(self) -> UnpackedArray:
        """See `BipolarArray.unpack`."""
        return self.with_scales().unpack()

    def prepare(
        self, *, gated: bool = False, float_terms: FloatTerms | None = None, for_floats: bool = False
    ) -> PreparedArray:
        """See `BipolarArray.prepare`; None takes the integers of groups if kernels read them."""
        terms = self.prepared_terms
        if terms is None or float_terms not in (None, terms):
            return self.with_scales().prepare(gated=gated, float_terms=float_terms, for_floats=for_floats)
        check_preparable(self, gated)
        return _prepare(self, gated, terms, for_floats)

    def truncate(self, bits: int) -> BipolarArray:
        """See `BipolarArray.truncate`; the result has float32 scales."""
        return self.with_scales().truncate(bits)

    def check(self) -> None:
        """Raises ValueError if the leaves do not fit each other and the static attributes."""
        *batch, planes, n, words = self.planes.shape
        blocks = (*batch, n, num_groups(self.contracted_size, self.form.block_size))
        groups = (*batch, n, self.num_groups)
        expected = {
            "block_scale": blocks,
            "block_minimum": blocks if self.form.minimum else None,
            "group_scales": None if self.form.group_scales is None else groups,
            "group_minimums": groups if self.form.has_group_minimums else None,
        }
        found = {name: None if (leaf := getattr(self, name)) is None else tuple(leaf.shape) for name in expected}
        if found != expected or planes != self.bits or words != num_words(self.contracted_size):
            raise ValueError(
                f"inconsistent BlockScaledArray: planes {tuple(self.planes.shape)} should be "
                f"{(*batch, self.bits, n, num_words(self.contracted_size))}, and {found} should be {expected}. "
                "Shard it along n or a batch axis, not along the contracted one"
            )

    def _steps(self) -> Float[Array, "*batch n groups"]:
        scales = self.group_scales
        if self.form.group_scales == "nibbles":
            scales = scales & 15
        return self._of_groups(self.block_scale, scales)

    def _minimums(self) -> Float[Array, "*batch n groups"] | None:
        if not self.form.minimum:
            return None
        nibbles = self.form.group_scales == "nibbles"
        return self._of_groups(self.block_minimum, self.group_scales >> 4 if nibbles else self.group_minimums)

    def _of_groups(self, of_blocks: Array, integers: Array | None) -> Float[Array, "*batch n groups"]:
        """The product of the blocks' numbers and the groups' integers."""
        numbers = of_blocks.astype(jnp.float32)
        if integers is None:
            return numbers
        numbers = spread_groups(numbers, integers.shape[-1], self.form.block_size // self.group_size)
        return numbers * integers.astype(jnp.float32)


# Programs, so that an eager call makes one pass over the codes; within a trace they are inlined.
@functools.partial(jax.jit, static_argnames=("gated", "terms", "for_floats"), inline=True)
def _prepare(array: BlockScaledArray, gated: bool, terms: BlockTerms, for_floats: bool) -> PreparedArray:
    return prepared(array, gated, terms, for_floats)


@functools.partial(jax.jit, inline=True)
def _with_scales(array: BlockScaledArray) -> BipolarArray:
    return BipolarArray(
        array.planes,
        array.scale,
        array.offset,
        array.row_sums,
        array.format,
        array.contracted_size,
        array.axis,
        array.group_size,
    )


@functools.partial(jax.jit, inline=True)
def _dequantize(array: BlockScaledArray) -> Float[Array, "*shape"]:
    def of_elements(per_group: Array) -> Array:
        return spread_groups(per_group, array.contracted_size, array.group_size)

    steps, minimums, stored = array._steps(), array._minimums(), array.stored().astype(jnp.int32)
    numbers = of_elements(steps) * (array.form.factor * stored - array.form.zero).astype(jnp.float32)
    return array._as_shape(numbers if minimums is None else numbers + of_elements(minimums))

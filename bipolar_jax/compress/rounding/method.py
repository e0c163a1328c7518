"""What is asked of a rounding, and what it returns."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.quantize.integer_groups import IntegerGroups
from bipolar_jax.quantize.precision import Precision
from bipolar_jax.quantize.rounding import from_grid

Algorithm = Literal["nearest", "gptq"]
Grid = Literal["free", "zero_point", "symmetric"]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How weights are rounded to the grid of a precision. Hashable, so that it can be static in `jax.jit`.

    Attributes:
      algorithm: "nearest" rounds every weight by itself, and sees of the Hessian its diagonal at most. "gptq" moves
        the error of each rounded input to the inputs after it (arXiv 2210.17323); descent follows.
      descent_passes: after GPTQ, how often each code in turn is moved to its best place among the others (QuantEase,
        arXiv 2309.01885), with scales and offsets refitted before and after.
      act_order: whether GPTQ rounds the inputs of large Hessian diagonals first. Groups stay runs of neighbors.
      damping: added to the Hessian's diagonal, in units of its mean; at least 1e-6, because factors are float32.
      block: inputs that are rounded between two updates of all the others; a matter of speed alone.
      grid: "free" fits scale and offset, "zero_point" keeps zero on the grid (one bit cannot, and is symmetric),
        "symmetric" has no offset. Of integer groups, symmetric ones are as near to it as integers allow.
      weighted_grid: whether the search for the grid weighs errors by the Hessian's diagonal: for models that are not
        rotated, whose inputs are uneven.
      asymmetry: 0 to 1, how much of the difference between the inputs of the float and of the quantized model the
        rounding makes up for, see `asymmetric_target`; it needs the product of both, `cross`.
      nested: fewer bits that the codes' high planes should serve too, such as (6, 4): `BipolarArray.truncate` then
        loses little, at some cost to all planes. For GPTQ; the grid is not refitted.
      nested_decay: errors of a precision that drops d planes weigh 2^(-nested_decay * d) where codes are chosen, and
        the root of that where the grid is searched: less than 1 serves fewer bits better, and all planes worse.

    Raises:
      ValueError: a value outside the above.
    """

    algorithm: Algorithm = "gptq"
    descent_passes: int = 2
    act_order: bool = True
    damping: float = 0.01
    block: int = 64
    grid: Grid = "free"
    weighted_grid: bool = False
    asymmetry: float = 0.0
    nested: tuple[int, ...] = ()
    nested_decay: float = 1.0

    def __post_init__(self):
        for name, allowed in {"algorithm": Algorithm, "grid": Grid}.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        for name, least in {"descent_passes": 0, "block": 1}.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {getattr(self, name)!r}")
        for name in ("act_order", "weighted_grid"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not (isinstance(self.damping, int | float) and 0 <= self.damping < float("inf")):
            raise ValueError(f"damping must be finite and at least 0, got {self.damping!r}")
        if not (isinstance(self.asymmetry, int | float) and 0 <= self.asymmetry <= 1):
            raise ValueError(f"asymmetry must be from 0 to 1, got {self.asymmetry!r}")
        if not (isinstance(self.nested_decay, int | float) and 0 <= self.nested_decay <= 2):
            raise ValueError(f"nested_decay must be from 0 to 2, got {self.nested_decay!r}")
        if isinstance(self.nested, list):
            object.__setattr__(self, "nested", tuple(self.nested))
        are_bits = isinstance(self.nested, tuple) and all(type(bits) is int and bits >= 1 for bits in self.nested)
        if not are_bits or self.nested != tuple(sorted(set(self.nested), reverse=True)):
            raise ValueError(f"nested must be falling numbers of bits, such as (6, 4), got {self.nested!r}")
        if self.nested and self.algorithm == "nearest":
            raise ValueError('algorithm "nearest" has one target for a weight: use "gptq" for nested precisions')

    @property
    def needs_hessian(self) -> bool:
        """Whether rounding reads the Hessian."""
        return self.algorithm != "nearest" or self.weighted_grid or self.asymmetry > 0

    def check(self, precision: Precision) -> None:
        """Raises ValueError for a precision that it cannot round to: symmetric integer groups, some nested bits."""
        if precision.scales == "integer" and self.grid == "symmetric":
            raise ValueError(
                f'grid "symmetric" is not one of integer groups, as of {precision}: use "free" or "zero_point"'
            )
        number_format = as_format(precision.w_bits)
        if self.nested and number_format.ternary:
            raise ValueError(
                f"codes of a ternary format have no high planes: nested precisions need bits, got {precision}"
            )
        if self.nested and self.nested[0] >= number_format.bits:
            raise ValueError(f"nested precisions have fewer bits than {precision}, got {self.nested}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RoundedRows:
    """Rows on a grid, as `bipolar_jax.from_codes(codes, bits, -1, scale, offset, group_size, groups)` takes them.

    Attributes:
      codes: of every weight.
      scale: number per unit of value, of every group; with integer groups of every row.
      offset: of every group; None for symmetric grids and integer groups.
      groups: integer scales and offsets; None for float ones.
    """

    codes: UInt8[Array, "n k"]
    scale: Float[Array, "n scales"]
    offset: Float[Array, "n scales"] | None
    groups: IntegerGroups | None = None

    def numbers(self, number_format: BipolarFormat, group_size: int | None) -> Float[Array, "n k"]:
        """The rounded weights, float32."""
        scale, offset = self.scale, self.offset
        if self.groups is not None:
            scale, offset = self.groups.float_grid(self.scale, number_format)
        return from_grid(self.codes, number_format, scale, offset, group_size)

"""Operands of `lax.dot_general`, transposed and merged to the layout of `matmul`, and its result back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxtyping import Array, Shaped

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How activations x and weights w of any layout fold into x [*batch, *free, k] and w [*batch, k, n].

    Attributes:
      x_order, w_order: the permutations of the axes of x and of w, before axes are merged.
      batch: sizes of the batch axes.
      x_free, w_free: sizes of the axes of one operand that the product keeps.
      k: product of the contracted sizes, 1 if none is contracted.
    """

    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    batch: tuple[int, ...]
    x_free: tuple[int, ...]
    w_free: tuple[int, ...]
    k: int

    @classmethod
    def of(cls, x_shape: Sequence[int], w_shape: Sequence[int], dimension_numbers: DimensionNumbers) -> Contraction:
        """From the dimension numbers of `lax.dot_general` with x as its lhs and w as its rhs."""
        (x_contracting, w_contracting), (x_batch, w_batch) = dimension_numbers
        x_free = tuple(i for i in range(len(x_shape)) if i not in {*x_contracting, *x_batch})
        w_free = tuple(i for i in range(len(w_shape)) if i not in {*w_contracting, *w_batch})
        return cls(
            x_order=(*x_batch, *x_free, *x_contracting),
            w_order=(*w_batch, *w_contracting, *w_free),
            batch=tuple(w_shape[i] for i in w_batch),
            x_free=tuple(x_shape[i] for i in x_free),
            w_free=tuple(w_shape[i] for i in w_free),
            k=math.prod(w_shape[i] for i in w_contracting),
        )

    @property
    def n(self) -> int:
        """Outputs for each row of x."""
        return math.prod(self.w_free)

    def kept_of_x[Item](self, by_axis: Sequence[Item]) -> tuple[Item, ...]:
        """Of items for each axis of x, those of the batch axes and of the kept ones, in the order of the result."""
        return tuple(by_axis[i] for i in self.x_order[: len(self.batch) + len(self.x_free)])

    def fold_x(self, x: Shaped[Array, "*x_shape"]) -> Shaped[Array, "*batch_and_free k"]:
        """x with the contracted axes merged into the last one."""
        return x.transpose(self.x_order).reshape(*self.batch, *self.x_free, self.k)

    def fold_w(self, w: Shaped[Array, "*w_shape"]) -> Shaped[Array, "*batch k n"]:
        """w with the contracted axes merged into the last but one, and the kept ones into the last."""
        return w.transpose(self.w_order).reshape(*self.batch, self.k, self.n)

    def unfold(self, y: Shaped[Array, "*batch_and_free n"]) -> Shaped[Array, "*y_shape"]:
        """The product in the layout of `lax.dot_general`: batch axes, then those of x, then those of w."""
        return y.reshape(*self.batch, *self.x_free, *self.w_free)

"""`AffineGrid` and `NestedGrid`: the numbers of codes, with rows last, as loops over inputs need them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AffineGrid:
    """The code u of a group stands for step * u + base.

    Axes are those of inputs and rows, in this order, so that what one input has to do is a vector over all rows.

    Attributes:
      step: at least 0; a group of step 0 has one number.
      base: the number of code 0.
      largest: the largest code. It is no static field, so that all formats share compiled programs.
    """

    step: Float[Array, "*groups n"]
    base: Float[Array, "*groups n"]
    largest: int | Int[Array, ""]

    def of(self, groups: Int[Array, "*k"]) -> AffineGrid:
        """The grid of one group or several, given their indices."""
        return AffineGrid(self.step[groups], self.base[groups], self.largest)

    def codes(self, x: Float[Array, "*groups n"]) -> Float[Array, "*groups n"]:
        """The codes of the nearest numbers, as float32; the middle one where the step is 0."""
        safe = jnp.where(self.step > 0, self.step, 1.0)
        middle = (self.largest + 1) // 2
        codes = jnp.where(self.step > 0, jnp.floor((x - self.base) / safe + 0.5), middle)
        return jnp.clip(codes, 0, self.largest)

    def numbers(self, codes: Float[Array, "*groups n"] | UInt8[Array, "*groups n"]) -> Float[Array, "*groups n"]:
        """step * u + base."""
        return self.step * codes.astype(jnp.float32) + self.base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NestedGrid:
    """The numbers of a code and of its high planes: with d planes dropped, 2^d codes stand for one number.

    As an `AffineGrid`, but numbers and targets have an axis of precisions before the rows. The code is the one of least
    squared distance from the targets, summed over precisions (MatGPTQ, arXiv 2602.03537). A precision that drops d
    planes weighs 2^(-decay d), so that its errors, of about 4^d, matter more than those of all planes, but not as much
    more.

    Attributes:
      step, base: of the codes with all planes.
      middle: of each precision, what the number of 2^d codes is above that of the lowest: step * (2^d - 1) / 2, their
        mean; with integer groups the integer below.
      largest: the largest code.
      dropped: planes that each precision drops, 0 first.
      decay: see `Rounding.nested_decay`.
    """

    step: Float[Array, "*groups n"]
    base: Float[Array, "*groups n"]
    middle: Float[Array, "*groups precisions n"]
    largest: int = dataclasses.field(metadata={"static": True})
    dropped: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    decay: float = dataclasses.field(default=1.0, metadata={"static": True})

    def of(self, groups: Int[Array, "*k"]) -> NestedGrid:
        """The grid of one group or several, given their indices."""
        return dataclasses.replace(self, step=self.step[groups], base=self.base[groups], middle=self.middle[groups])

    def codes(self, x: Float[Array, "precisions n"]) -> Float[Array, "n"]:
        """The best code of each row, as float32, of all there are."""

        def distance(code):
            apart = self.numbers(jnp.full(self.step.shape, code)) - x
            return sum(apart[i] ** 2 / 2 ** (self.decay * d) for i, d in enumerate(self.dropped))

        distances = jax.vmap(distance)(jnp.arange(self.largest + 1, dtype=jnp.float32))
        return jnp.argmin(distances, axis=0).astype(jnp.float32)

    def numbers(
        self, codes: Float[Array, "*groups n"] | UInt8[Array, "*groups n"]
    ) -> Float[Array, "*groups precisions n"]:
        """step * (the lowest code with the same high planes) + base + middle, for each precision."""
        codes = codes.astype(jnp.float32)
        lowest = [jnp.floor(codes / 2**d) * 2**d for d in self.dropped]
        return jnp.stack([self.step * code + self.base for code in lowest], axis=-2) + self.middle

"""`AffineGrid`: the numbers of codes, with rows last, as loops over inputs need them."""

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

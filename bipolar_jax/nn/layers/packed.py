"""The Flax variable that holds packed weights."""

from __future__ import annotations

from flax import nnx


class Packed(nnx.Variable):
    """A `BipolarArray` inside a module.

    Not an `nnx.Param`: bits have no gradient, so `nnx.grad` and optimizers, which by
    default take the parameters, pass it by.
    """

"""The Flax variable that holds packed weights."""

from __future__ import annotations

from flax import nnx


class Packed(nnx.Variable):
    """The variable of a module that holds a `BipolarArray`.

    It is not an `nnx.Param`, because packed bits have no gradient: `nnx.grad` and optimizers,
    which by default select `nnx.Param`, leave it out.
    """

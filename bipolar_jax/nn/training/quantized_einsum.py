"""An einsum of activations and weights through `DotGeneral`, for `nnx.Einsum`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from opt_einsum.parser import parse_einsum_input  # JAX's own dependency

from bipolar_jax.nn.training.dot_general import DotGeneral


@dataclasses.dataclass(frozen=True)
class QuantizedEinsum:
    """`jnp.einsum` of two operands, the second of which is the weights; an `einsum_op` for `nnx.Einsum`.

        nnx.Einsum("nta,hab->nthb", (8, 2, 4), einsum_op=QuantizedEinsum(bj.DotGeneral(2, 4)), rngs=rngs)

    `jnp.einsum` with a `DotGeneral` as its `_dot_general` would not do: it exchanges the
    operands where that saves a transposition, and the weights with them. `quantize_model`
    leaves such layers as they are: they go on packing their float kernels in every call.

    Attributes:
      dot_general: the bits, with weights="rhs".

    Raises:
      ValueError: a `DotGeneral` that takes the left operand for the weights.
    """

    dot_general: DotGeneral

    def __post_init__(self):
        if self.dot_general.weights != "rhs":
            raise ValueError(
                f'the weights of an einsum are its second operand: its DotGeneral needs weights="rhs", '
                f"got {self.dot_general.weights!r}"
            )

    def __call__(
        self,
        subscripts: str,
        x: Float[Array, "..."],
        w: Float[Array, "..."],
        *,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
        out_sharding: None = None,
    ) -> Float[Array, "..."]:
        """As `jnp.einsum(subscripts, x, w)`, quantized as `DotGeneral` does.

        Raises:
          ValueError: an index twice in one operand, or an index of the weights alone that
            the result does not have.
          NotImplementedError: an out_sharding.
        """
        if out_sharding is not None:
            raise NotImplementedError("an out_sharding of QuantizedEinsum: reshard its result")
        inputs, result, _ = parse_einsum_input((subscripts, x, w))
        x_axes, w_axes = inputs.split(",")
        for axes in (x_axes, w_axes):
            if len(set(axes)) != len(axes):
                raise ValueError(f"{subscripts!r} has an index twice in one operand, which no dot_general contracts")
        if summed := [axis for axis in w_axes if axis not in x_axes + result]:
            raise ValueError(
                f"{subscripts!r} sums the weights alone over {summed}: sum them before, or keep the index in the result"
            )
        # What only x has and the result has not is summed first; the product is linear in it.
        alone = [axis for axis in x_axes if axis not in w_axes + result]
        x = jnp.sum(x, axis=tuple(map(x_axes.index, alone)))
        x_axes = "".join(axis for axis in x_axes if axis not in alone)
        shared = [axis for axis in x_axes if axis in w_axes]
        batch = [axis for axis in shared if axis in result]
        contracted = [axis for axis in shared if axis not in result]
        numbers = tuple(
            tuple(tuple(map(axes.index, names)) for axes in (x_axes, w_axes)) for names in (contracted, batch)
        )
        y = self.dot_general(x, w, numbers, precision, preferred_element_type)
        y_axes = [*batch, *(a for a in x_axes if a not in shared), *(a for a in w_axes if a not in shared)]
        return y.transpose([y_axes.index(axis) for axis in result])

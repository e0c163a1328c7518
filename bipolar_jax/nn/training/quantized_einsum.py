"""An einsum of activations and weights by `DotGeneral`, for `nnx.Einsum`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from opt_einsum.parser import parse_einsum_input  # a dependency of JAX

from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.stateful_dot_general import StatefulDotGeneral


@dataclasses.dataclass(frozen=True)
class QuantizedEinsum:
    """`jnp.einsum` of activations and weights, in this order; an `einsum_op` for `nnx.Einsum`.

        nnx.Einsum("nta,hab->nthb", (8, 2, 4), einsum_op=QuantizedEinsum(bj.DotGeneral(2, 4)), rngs=rngs)

    `jnp.einsum` with a `DotGeneral` as its `_dot_general` would not do, because it swaps the
    operands where that saves a transpose, and the weights would be quantized as activations.
    `quantize_model` makes a packed `bipolar_jax.nn.Einsum` of such layers.

    Attributes:
      dot_general: how the operands are quantized, with weights="rhs".

    Raises:
      ValueError: a `DotGeneral` with weights="lhs".
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
        out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
    ) -> Float[Array, "..."]:
        """Computes `jnp.einsum(subscripts, x, w)` with both operands quantized as by `DotGeneral`.

        Args:
          subscripts: indices of x, of w and of the result, as for `jnp.einsum`.
          x, w: activations and weights.
          precision, preferred_element_type: as for `DotGeneral`.
          out_sharding: sharding of the result, for meshes with Explicit axes.

        Raises:
          ValueError: an index twice in one operand, or an index of w that neither x nor the
            result has.
        """
        return _einsum(self.dot_general, subscripts, x, w, precision, preferred_element_type, out_sharding)


class StatefulEinsum(nnx.Module):
    """A `QuantizedEinsum` by a `StatefulDotGeneral`: with learned step sizes, quantized gradients, or both.

    Attributes:
      dot_general: of this layer alone, made for its kernel with the contracted axes merged.
    """

    def __init__(self, dot_general: StatefulDotGeneral):
        self.dot_general = dot_general

    def __call__(
        self, subscripts, x, w, *, precision=None, preferred_element_type=None, out_sharding=None
    ) -> Float[Array, "..."]:
        """Computes as `QuantizedEinsum`."""
        return _einsum(self.dot_general, subscripts, x, w, precision, preferred_element_type, out_sharding)


def _einsum(dot_general, subscripts, x, w, precision, preferred_element_type, out_sharding):
    inputs, result, _ = parse_einsum_input((subscripts, x, w))
    x_axes, w_axes = inputs.split(",")
    for axes in (x_axes, w_axes):
        if len(set(axes)) != len(axes):
            raise ValueError(
                f"{subscripts!r} has an index twice in one operand, which is not supported: take the diagonal first"
            )
    if summed := [axis for axis in w_axes if axis not in x_axes + result]:
        raise ValueError(
            f"{subscripts!r} sums the weights alone over {summed}: sum them first, or keep the index in the result"
        )
    # Indices that only x has are summed before the product.
    only_x = [axis for axis in x_axes if axis not in w_axes + result]
    x = jnp.sum(x, axis=tuple(map(x_axes.index, only_x)))
    x_axes = "".join(axis for axis in x_axes if axis not in only_x)
    shared = [axis for axis in x_axes if axis in w_axes]
    batch = [axis for axis in shared if axis in result]
    contracted = [axis for axis in shared if axis not in result]
    numbers = tuple(tuple(tuple(map(axes.index, names)) for axes in (x_axes, w_axes)) for names in (contracted, batch))
    y_axes = [*batch, *(a for a in x_axes if a not in shared), *(a for a in w_axes if a not in shared)]
    if out_sharding is not None:
        out_sharding = _with_axes(out_sharding, [result.index(axis) for axis in y_axes])
    y = dot_general(x, w, numbers, precision, preferred_element_type, out_sharding=out_sharding)
    return y.transpose([y_axes.index(axis) for axis in result])


def _with_axes(
    sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec, order: list[int]
) -> jax.sharding.NamedSharding | jax.sharding.PartitionSpec:
    """The sharding of an array before axes were transposed: its axis i is the given one's order[i]."""
    is_named = isinstance(sharding, jax.sharding.NamedSharding)
    axes = tuple(sharding.spec if is_named else sharding)
    axes += (None,) * (len(order) - len(axes))
    spec = jax.P(*(axes[i] for i in order))
    return jax.NamedSharding(sharding.mesh, spec) if is_named else spec

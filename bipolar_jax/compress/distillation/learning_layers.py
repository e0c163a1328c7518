"""Layers that stand in for packed ones while these learn.

They compute what the packed layers compute, with float products: activations are quantized token by token as every
backend does it, weights are rounded, and the product is a dot of floats. With 16-bit operands the activations' codes,
which are integers up to 255, stay exact; weights are rounded to them, and so are gradients where they are operands.
All sums are float32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from bipolar_jax.compress.distillation.latent_weights import LatentGroups, LatentWeights
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.hadamard import Hadamard, hadamard_matrix
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear, fuses
from bipolar_jax.nn.layers.packed import CountedModule
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.straight_through import straight_through


class Latent(nnx.Param):
    """Latent weights, which learn."""


class Step(nnx.Param):
    """Scales and offsets, which learn more slowly."""


class Frozen(nnx.Param):
    """Numbers that do not learn."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float_product(x: Float[Array, "m k"], rows: Float[Array, "n k"], dtype: Any) -> Float[Array, "m n"]:
    """x @ rows.T with operands of `dtype`, and so are those of its gradient's products; sums and results are float32.

    JAX's own gradient would multiply with the float32 cotangent, at a fraction of the speed.
    """
    return _dot(x.astype(dtype), rows.astype(dtype), 1, 1)


def _forward(x, rows, dtype):
    operands = x.astype(dtype), rows.astype(dtype)
    return _dot(*operands, 1, 1), (operands, jnp.zeros(0, x.dtype), jnp.zeros(0, rows.dtype))


def _backward(dtype, kept, cotangent):
    ((x, rows), *like), cotangent = kept, cotangent.astype(dtype)
    gradients = _dot(cotangent, rows, 1, 0), _dot(cotangent, x, 0, 0)
    return tuple(gradient.astype(each.dtype) for gradient, each in zip(gradients, like, strict=True))


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "_ _"]:
    highest = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=highest, preferred_element_type=jnp.float32)


float_product.defvjp(_forward, _backward)


def quantized_product(
    x: Float[Array, "*batch k"], rows: Float[Array, "n k"], a_format: BipolarFormat | None, dtype: Any
) -> Float[Array, "*batch n"]:
    """x @ rows.T with quantized activations, float32.

    Args:
      x: activations, differentiated straight through; those that a span below 1 clips have no gradient.
      rows: weights.
      a_format: the grid of the activations; None leaves them float.
      dtype: of the product's operands.
    """
    tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    scale = None
    if a_format is not None:
        quantized = quantize_tokens(jax.lax.stop_gradient(tokens), a_format)
        # Values are 2 apart, but for one bit: half of the difference to zero's value is a small integer.
        zero = quantized.zero_value[:, None]
        steps = (a_format.values(quantized.codes) - zero).astype(jnp.float32) / 2
        scale = 2 * quantized.scale[:, None]
        in_steps = tokens / jnp.where(scale == 0, 1, scale)
        if a_format.span < 1:
            low, high = ((end - zero).astype(jnp.float32) / 2 for end in (-a_format.max_value, a_format.max_value))
            in_steps = jnp.clip(in_steps, low - 0.5, high + 0.5)
        tokens = straight_through(steps, in_steps)
    product = float_product(tokens, rows, jnp.dtype(dtype))
    product = product if scale is None else product * scale
    return product.reshape(*x.shape[:-1], rows.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixRotation:
    """Stands in for a `Hadamard`, as one product with its matrix: each stage of butterflies is a pass over memory.

    Attributes:
      hadamard: the rotation.
      dtype: of the product's operands.
    """

    hadamard: Hadamard = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """The rotation of the last axis, in `dtype`."""
        signs, block = self.hadamard.drawn_signs(), self.hadamard.block
        numbers = x.astype(self.dtype)
        if signs is not None:
            numbers = numbers * jnp.asarray(signs, self.dtype).reshape(*(1,) * (x.ndim - 1), -1)
        matrix = functools.reduce(np.kron, map(hadamard_matrix, self.hadamard.orders))
        rotated = jax.lax.dot(
            numbers.reshape(-1, block),
            jnp.asarray(matrix, self.dtype),
            precision=jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None,
            preferred_element_type=self.dtype,
        )
        return rotated.reshape(x.shape) * jnp.asarray(block**-0.5, self.dtype)


class LearningLinear(CountedModule):
    """Stands in for `nn.Linear`, or for a stack of them.

    Attributes:
      rows, scale, offset, groups: see `LatentWeights`; variables, whose class says how they learn.
      bias: the packed layer's, or None.
      a_format: the grid of the activations, or None.
      dtype: of the product's operands.
      result_dtype: of what a call returns; None is that of its input.
    """

    def __init__(
        self,
        layer: Linear,
        floats: Float[Array, "*stack k n"] | None,
        *,
        learns: bool,
        learn_groups: bool,
        dtype: Any,
        result_dtype: Any = None,
    ):
        """Makes the stand-in.

        Args:
          layer: the packed layer.
          floats: its weights before they were rounded, or None.
          learns: False freezes all its numbers.
          learn_groups: whether integers of integer groups learn with the others.
          dtype: of the product's operands.
          result_dtype: of what a call returns; None is that of its input.

        Raises:
          ValueError: a layer over other axes than the last, one that gives the bits of its training, or weights that
            are laid out for inference.
        """
        if not fuses(layer):
            raise ValueError(
                "layers that were trained with DotGeneral, or contract other axes than the last, are not distilled: "
                "leave them float, or make others of them with without_training"
            )
        packed = layer.kernel.get_value()
        if not isinstance(packed, BipolarArray):
            kind = type(packed).__name__
            raise ValueError(f"weights are a {kind}: distil the model before prepare_for_inference")
        latent = LatentWeights.of(packed, floats)
        latent = latent.with_latent_groups() if learns and learn_groups else latent
        number, step = (Latent, Step) if learns else (Frozen, Frozen)
        self.rows, self.scale = number(latent.rows), step(latent.scale)
        self.offset = nnx.data(None if latent.offset is None else step(latent.offset))
        self.groups, self.group_steps = nnx.data(None), nnx.data(None)
        if isinstance(latent.groups, LatentGroups):
            self.groups = nnx.data(Frozen(latent.groups.unit))
            self.group_steps = nnx.data(Step(jnp.stack([latent.groups.scale, latent.groups.offset], axis=-3)))
        elif latent.groups is not None:
            self.groups = nnx.data(Frozen(latent.groups))
        self.bias = nnx.data(None if layer.bias is None else step(layer.bias[...]))
        self.number_format, self.group_size = latent.format, latent.group_size
        self.a_format, self.dtype = layer.precision.a_format, jnp.dtype(dtype)
        self.result_dtype = None if result_dtype is None else jnp.dtype(result_dtype)

    def latent(self) -> LatentWeights:
        """The layer's weights."""
        offset = None if self.offset is None else self.offset[...]
        groups = None if self.groups is None else self.groups.get_value()
        if self.group_steps is not None:
            groups = LatentGroups(*jnp.moveaxis(self.group_steps[...], -3, 0), groups)
        return LatentWeights(self.rows[...], self.scale[...], offset, groups, self.number_format, self.group_size)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """The packed layer's product and bias, in `result_dtype`."""
        y = quantized_product(x, self.latent().numbers(), self.a_format, self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
        return y.astype(self.result_dtype or x.dtype)


class FrozenEmbed(CountedModule):
    """Stands in for `nn.Embed`, whose table does not learn.

    Attributes:
      table: its numbers, float32.
      operand: the same in `dtype`, if that is another: of `attend`, which is called once for each window of a step.
      a_format: the grid of the activations of `attend`, or None.
      dtype: of the operands of `attend`.
      row_dtype: of the rows that a lookup returns.
    """

    def __init__(self, layer: Embed, *, dtype: Any):
        self.table = Frozen(layer.embedding.get_value().dequantize())
        self.a_format, self.dtype, self.row_dtype = layer.precision.a_format, jnp.dtype(dtype), jnp.dtype(layer.dtype)
        is_other = self.table[...].dtype != self.dtype
        self.operand = nnx.data(Frozen(self.table[...].astype(self.dtype)) if is_other else None)

    def __call__(self, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """The rows of these ids."""
        return self.table[...][ids].astype(self.row_dtype)

    def attend(self, query: Float[Array, "*batch features"]) -> Float[Array, "*batch rows"]:
        """query @ table.T, float32."""
        table = self.table if self.operand is None else self.operand
        return quantized_product(query, table[...], self.a_format, self.dtype)

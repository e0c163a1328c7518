"""Layers that stand in for packed ones while these learn.

They compute what the packed layers compute, with float products: activations are quantized token by token as every
backend does it, weights are rounded, and the product is a dot of floats. On 16-bit floats the activations' codes, which
are integers up to 255, stay exact; weights are rounded to them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from bipolar_jax.compress.distillation.latent_weights import LatentGroups, LatentWeights
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
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


def quantized_product(
    x: Float[Array, "*batch k"], rows: Float[Array, "n k"], a_format: BipolarFormat | None, dtype: Any
) -> Float[Array, "*batch n"]:
    """x @ rows.T with quantized activations, float32.

    Args:
      x: activations, differentiated straight through.
      rows: weights.
      a_format: the grid of the activations; None leaves them float.
      dtype: of the product's operands; sums are float32.
    """
    tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    scale = None
    if a_format is not None:
        quantized = quantize_tokens(jax.lax.stop_gradient(tokens), a_format)
        # Values are 2 apart, but for one bit: half of the difference to zero's value is a small integer.
        steps = (a_format.values(quantized.codes) - quantized.zero_value[:, None]).astype(jnp.float32) / 2
        scale = 2 * quantized.scale[:, None]
        tokens = straight_through(steps, tokens / jnp.where(scale == 0, 1, scale))
    highest = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = jax.lax.dot_general(
        tokens.astype(dtype),
        rows.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=highest,
        preferred_element_type=jnp.float32,
    )
    product = product if scale is None else product * scale
    return product.reshape(*x.shape[:-1], rows.shape[0])


class LearningLinear(CountedModule):
    """Stands in for `nn.Linear`, or for a stack of them.

    Attributes:
      rows, scale, offset, groups: see `LatentWeights`; variables, whose class says how they learn.
      bias: the packed layer's, or None.
      a_format: the grid of the activations, or None.
      dtype: of the product's operands.
    """

    def __init__(
        self, layer: Linear, floats: Float[Array, "*stack k n"] | None, *, learns: bool, learn_groups: bool, dtype: Any
    ):
        """Makes the stand-in.

        Args:
          layer: the packed layer.
          floats: its weights before they were rounded, or None.
          learns: False freezes all its numbers.
          learn_groups: whether integers of integer groups learn with the others.
          dtype: of the product's operands.

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

    def latent(self) -> LatentWeights:
        """The layer's weights."""
        offset = None if self.offset is None else self.offset[...]
        groups = None if self.groups is None else self.groups.get_value()
        if self.group_steps is not None:
            groups = LatentGroups(*jnp.moveaxis(self.group_steps[...], -3, 0), groups)
        return LatentWeights(self.rows[...], self.scale[...], offset, groups, self.number_format, self.group_size)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """The packed layer's product and bias, in x's dtype."""
        y = quantized_product(x, self.latent().numbers(), self.a_format, self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
        return y.astype(x.dtype)


class FrozenEmbed(CountedModule):
    """Stands in for `nn.Embed`, whose table does not learn.

    Attributes:
      table: its numbers, float32.
      a_format: the grid of the activations of `attend`, or None.
      dtype: of the operands of `attend`.
      row_dtype: of the rows that a lookup returns.
    """

    def __init__(self, layer: Embed, *, dtype: Any):
        self.table = Frozen(layer.embedding.get_value().dequantize())
        self.a_format, self.dtype, self.row_dtype = layer.precision.a_format, jnp.dtype(dtype), jnp.dtype(layer.dtype)

    def __call__(self, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """The rows of these ids."""
        return self.table[...][ids].astype(self.row_dtype)

    def attend(self, query: Float[Array, "*batch features"]) -> Float[Array, "*batch rows"]:
        """query @ table.T, float32."""
        return quantized_product(query, self.table[...], self.a_format, self.dtype)

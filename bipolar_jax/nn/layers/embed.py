"""Embedding layer with packed rows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.ops import lookup, matmul
from bipolar_jax.packing import quantize
from bipolar_jax.quantize import Precision

_default_embedding_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Embed(nnx.Module):
    """`nnx.Embed` with bipolar-INT rows, packed along the feature axis.

    In this layout one table serves both ends of a model with tied embeddings: a lookup decodes
    the rows of its ids, and `attend` multiplies with the whole table.

    Attributes:
      embedding: `Packed` array of logical shape (num_embeddings, features).
      precision: the precision of the table, and the activation bits of `attend`.
      dtype: dtype of the rows that a lookup returns.
      implementation: the backend of `attend`, see `bipolar_jax.matmul`.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        precision: Precision,
        embedding_init: Any = _default_embedding_init,
        dtype: Any = jnp.float32,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        """Initializes float rows as `nnx.Embed` does and quantizes them. Raises ValueError as `quantize`."""
        table = embedding_init(rngs.params(), (num_embeddings, features), jnp.float32)
        self.embedding = Packed(quantize(table, precision.w_bits, -1, precision.group_size, precision.calibration))
        self.precision = precision
        self.dtype = dtype
        self.implementation = implementation

    @classmethod
    def from_float(cls, layer: nnx.Embed, precision: Precision, *, implementation: str = "auto") -> Embed:
        """Quantizes a float layer. Raises ValueError as `quantize`."""
        return cls(
            layer.num_embeddings,
            layer.features,
            precision=precision,
            embedding_init=lambda *_: layer.embedding[...],
            dtype=layer.embedding.dtype if layer.dtype is None else layer.dtype,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """The rows of the given ids, in `dtype`; NaN for ids out of range."""
        return lookup(self.embedding.get_value(), ids, self.dtype)

    def attend(self, query: Float[Array, "*batch features"]) -> Float[Array, "*batch num_embeddings"]:
        """query @ embedding.T, the output projection of tied embeddings, in query's dtype."""
        return matmul(query, self.embedding.get_value().T, self.precision.a_bits, implementation=self.implementation)

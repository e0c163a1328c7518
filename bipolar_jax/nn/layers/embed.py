"""Embedding with packed rows."""

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
    """`nnx.Embed` with rows in bipolar-INT, packed along the feature axis.

    So packed, one table serves both ends of a model with tied embeddings: a lookup
    decodes the rows it needs, and `attend` multiplies with the whole of it.

    Attributes:
      embedding: `Packed` array of logical shape (num_embeddings, features).
      precision: what the table was quantized to, and the activation bits of `attend`.
      dtype: of the looked-up rows.
      implementation: the backend of `bipolar_jax.matmul`.
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
        """Draws float rows as `nnx.Embed` does and quantizes them."""
        table = embedding_init(rngs.params(), (num_embeddings, features), jnp.float32)
        self.embedding = Packed(quantize(table, precision.w_bits, -1, precision.group_size, precision.calibration))
        self.precision = precision
        self.dtype = dtype
        self.implementation = implementation

    @classmethod
    def from_float(cls, layer: nnx.Embed, precision: Precision, *, implementation: str = "auto") -> Embed:
        """The packed counterpart of a float layer."""
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
        """Rows of the given ids; NaN for ids that are out of range."""
        return lookup(self.embedding.get_value(), ids, self.dtype)

    def attend(self, query: Float[Array, "*batch features"]) -> Float[Array, "*batch num_embeddings"]:
        """query @ embedding.T, the output projection of tied embeddings."""
        return matmul(query, self.embedding.get_value().T, self.precision.a_bits, implementation=self.implementation)

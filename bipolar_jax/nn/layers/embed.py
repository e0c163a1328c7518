"""Embedding layer with packed rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jaxtyping import Array, Float, Integer

from bipolar_jax.nn.layers.dense_layout import leading_axes
from bipolar_jax.nn.layers.packed import Packed, PackedModule
from bipolar_jax.nn.layers.promotion import compute_dtype
from bipolar_jax.ops import lookup, matmul
from bipolar_jax.ops.compiled import as_array
from bipolar_jax.packing import BipolarArray, quantize
from bipolar_jax.quantize import Precision

_default_embedding_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Embed(PackedModule):
    """`nnx.Embed` with bipolar-INT rows, packed along the feature axis.

    In this layout one table serves both ends of a model with tied embeddings: a lookup decodes
    the rows of its ids, and `attend` multiplies with the whole table.

    Attributes:
      embedding: `Packed` array of logical shape (num_embeddings, features).
      precision: the precision of the table, and the activation bits of `attend`.
      num_embeddings, features: the shape of the table.
      dtype: dtype of the rows that a lookup returns, and of the logits of `attend`.
      param_dtype, promote_dtype: as in Flax.
      implementation: the backend of `attend`, see `bipolar_jax.matmul`.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        precision: Precision | str,
        embedding_init: Any = _default_embedding_init,
        dtype: Any = jnp.float32,
        promote_dtype: Any = flax_promote_dtype,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        """Initializes float rows as `nnx.Embed` does and quantizes them. Raises ValueError as `quantize`."""
        precision = Precision.of(precision)
        table = embedding_init(rngs.params(), (num_embeddings, features), jnp.float32)
        self.num_embeddings, self.features = num_embeddings, features
        self.embedding = Packed(
            quantize(table, precision.w_bits, -1, precision.group_size, precision.calibration, precision.scales)
        )
        self.precision = precision
        self.dtype = dtype
        self.param_dtype = table.dtype
        self.promote_dtype = promote_dtype
        self.implementation = implementation

    @classmethod
    def from_float(cls, layer: nnx.Embed, precision: Precision | str, *, implementation: str = "auto") -> Embed:
        """Quantizes a float layer or a stack of layers.

        Raises:
          ValueError: a stack on another axis than the first; or as `quantize`.
        """
        leading_axes("embedding", layer.embedding.shape, (layer.num_embeddings, layer.features))
        return cls(
            layer.num_embeddings,
            layer.features,
            precision=precision,
            embedding_init=lambda *_: layer.embedding[...],
            dtype=layer.embedding.dtype if layer.dtype is None else layer.dtype,
            promote_dtype=layer.promote_dtype,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )

    def __call__(self, inputs: Integer[Array, "*batch"], out_sharding: Any = None) -> Float[Array, "*batch features"]:
        """The rows of the given ids, in `dtype`.

        As in Flax, ids from -num_embeddings to -1 count from the end, others out of range give NaN, and a table of one
        row answers every id.

        Args:
          inputs: row indices.
          out_sharding: sharding of the result, for meshes with Explicit axes.

        Raises:
          ValueError: ids that are not integers.
        """
        ids = jnp.asarray(inputs)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        if jnp.issubdtype(ids.dtype, jnp.signedinteger):
            if ids.dtype.itemsize < 4:
                ids = ids.astype(jnp.int32)  # a narrower type may not hold the number of rows
            ids = jnp.where(ids < 0, ids + self.num_embeddings, ids)
        if self.num_embeddings == 1:
            ids = jnp.zeros_like(ids)

        def rows(ids: Array, table: BipolarArray) -> Array:
            return lookup(table, ids, self.dtype)

        if out_sharding is not None:
            rows = jax.sharding.auto_axes(rows, out_sharding=out_sharding)
        return rows(ids, self.embedding.get_value())

    def attend(
        self, query: Float[Array, "*batch features"], out_sharding: Any = None
    ) -> Float[Array, "*batch num_embeddings"]:
        """query @ embedding.T, the output projection of tied embeddings, in `dtype`.

        Args:
          query: activations.
          out_sharding: as for a lookup.
        """

        def product(query: Array, table: BipolarArray) -> Array:
            return matmul(query, table.T, self.precision.a_format, implementation=self.implementation)

        if out_sharding is not None:
            product = jax.sharding.auto_axes(product, out_sharding=out_sharding)
        query = as_array(query)
        return product(query.astype(compute_dtype(self, query)), self.embedding.get_value())

"""Hessians of the squared error of a linear layer's output: the second moments of its input.

For rows w of weights and their rounded values q the error summed over tokens x is (w - q) H (w - q)^T with
H = sum x x^T / tokens (OBQ, arXiv 2208.11580; GPTQ, arXiv 2210.17323). The inputs x are those that the packed layer
multiplies: quantized and dequantized.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.quantize.precision import activation_format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """Weighted sums over tokens, to which batches are added one after the other.

    Those of a stack of experts have a leading axis, see `expert_moments`.

    Attributes:
      products: sum of weight * x x^T.
      weight: sum of the weights.
      cross_products: sum of weight * x y^T, with y the inputs of the float model; None if they are not summed.
    """

    products: Float[Array, "*experts k k"]
    weight: Float[Array, "*experts"]
    cross_products: Float[Array, "k k"] | None = None

    @classmethod
    def zeros(cls, k: int, *, with_cross: bool = False) -> SecondMoments:
        """Sums over no tokens."""
        cross = jnp.zeros((k, k), jnp.float32) if with_cross else None
        return cls(jnp.zeros((k, k), jnp.float32), jnp.zeros((), jnp.float32), cross)

    def add(
        self,
        x: Float[Array, "..."],
        a_bits: int | BipolarFormat | None,
        stream: Float[Array, "*batch hidden"] | None = None,
        float_x: Float[Array, "..."] | None = None,
    ) -> SecondMoments:
        """The sums with the tokens of a batch.

        Args:
          x: inputs of the layer; its last axes are k numbers.
          a_bits: bits of its activations, or their format; None leaves them float.
          stream: the residual stream that the layer's output is added to. An error of the output matters less where
            the stream is large, because a norm follows: the weight of a token is 1 / mean square of its stream. None
            gives all tokens the weight 1.
          float_x: inputs of the layer in the float model, for `cross_products`.
        """
        rows = x.reshape(-1, len(self.products))
        numbers = dequantized_tokens(rows, a_bits)
        if stream is None:
            weights = jnp.ones(rows.shape[:1], jnp.float32)
        else:
            weights = stream_weights(stream.reshape(-1, stream.shape[-1]))
        weighted = (numbers * weights[:, None]).T
        products = self.products + jnp.matmul(weighted, numbers, precision=jax.lax.Precision.HIGHEST)
        cross = self.cross_products
        if cross is not None:
            float_rows = float_x.reshape(rows.shape).astype(jnp.float32)
            cross = cross + jnp.matmul(weighted, float_rows, precision=jax.lax.Precision.HIGHEST)
        return SecondMoments(products, self.weight + weights.sum(), cross)

    def hessian(self) -> Float[Array, "k k"]:
        """The mean of x x^T over tokens whose weights have the mean 1; symmetric to the last bit."""
        mean = self.products / jnp.where(self.weight == 0, 1, self.weight)
        return (mean + mean.T) / 2

    def cross(self) -> Float[Array, "k k"] | None:
        """The mean of x y^T, in the units of `hessian`; None if it was not summed."""
        if self.cross_products is None:
            return None
        return self.cross_products / jnp.where(self.weight == 0, 1, self.weight)


def dequantized_tokens(x: Float[Array, "m k"], a_bits: int | BipolarFormat | None) -> Float[Array, "m k"]:
    """The numbers that a packed layer multiplies in place of x, float32."""
    if a_bits is None:
        return x.astype(jnp.float32)
    a_format = activation_format(a_bits)
    return quantize_tokens(x, a_format).dequantize(a_format)


def stream_weights(stream: Float[Array, "m hidden"]) -> Float[Array, " m"]:
    """1 / mean square of every row; 0 for rows of zeros, float32."""
    stream = stream.astype(jnp.float32)
    mean_square = jnp.mean(stream * stream, axis=-1)
    return jnp.where(mean_square > 0, 1 / jnp.where(mean_square > 0, mean_square, 1), 0)

"""The dtypes of a packed layer: Flax's promotion, without a float kernel."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jaxtyping import Array, Float

from bipolar_jax.nn.training.dot_general import common_float


def compute_dtype(layer: Any, x: Array, bias: Array | None = None) -> jnp.dtype:
    """The dtype that the float layer would cast x, its kernel and its bias to.

    Args:
      layer: has the attributes `dtype`, `param_dtype` and `promote_dtype` of the float layer; with both dtypes None,
        x keeps its dtype.
      x: the input.
      bias: the float bias, or None.
    """
    if layer.promote_dtype is not flax_promote_dtype:
        kernel = np.zeros((), layer.param_dtype or x.dtype)
        return layer.promote_dtype((x, kernel, bias), dtype=layer.dtype)[0].dtype
    if layer.dtype is not None:
        return jnp.dtype(layer.dtype)
    if layer.param_dtype is None:
        return x.dtype
    return jnp.result_type(x.dtype, layer.param_dtype, *([] if bias is None else [bias.dtype]))


def add_bias(y: Float[Array, "*shape"], bias: Float[Array, "*bias_shape"]) -> Float[Array, "*shape"]:
    """y + bias in the dtype that holds both; they differ if the layer's `preferred_element_type` is not its `dtype`."""
    dtype = common_float(y.dtype, bias.dtype)
    return y.astype(dtype) + bias.astype(dtype)

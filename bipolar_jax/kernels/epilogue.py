"""From integer products to the output: the arithmetic that follows every mainloop.

With x ~ s_x v_x per token and w ~ s_w v_w + o_w per output row n and group g,

    y[m, n] = s_x[m] * sum_g (s_w[n, g] * I[m, n, g] + o_w[n, g] * V[m, g]) + bias[n],

where I is the integer product of the values and V the sum of x's values in the group.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat


def value_sums(code_sums: Int[Array, "*rows"], a_format: BipolarFormat, length: int | Array) -> Int[Array, "*rows"]:
    """V from the sums of codes over groups of `length` elements: v = 2 u - W."""
    return 2 * code_sums - a_format.max_value * length


def scale_group(
    integers: Int[Array, "m n"],
    scale: Float[Array, " n"],
    offset: Float[Array, " n"] | None,
    x_value_sums: Int[Array, " m"],
) -> Float[Array, "m n"]:
    """One group's term of the sum over g, float32."""
    term = integers.astype(jnp.float32) * scale
    return term if offset is None else term + x_value_sums.astype(jnp.float32)[:, None] * offset


def finish(
    total: Float[Array, "m n"], token_scale: Float[Array, " m"], bias: Float[Array, " n"] | None, dtype: jnp.dtype
) -> Float[Array, "m n"]:
    """Token scale, bias and cast."""
    y = total * token_scale[:, None]
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)

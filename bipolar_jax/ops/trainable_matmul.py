"""The packed product, with a gradient for the floats that were packed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.ops.matmul import matmul, vary_alike
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.precision import activation_format
from bipolar_jax.quantize.stochastic import check_gradient_bits, stochastic_round
from bipolar_jax.quantize.straight_through import straight_through


@dataclasses.dataclass(frozen=True)
class GradientPrecision:
    """How the two products of the backward pass are computed.

    Attributes:
      dtype: of their operands, float32 or bfloat16; None takes that of x. Sums are float32.
      bits: 2 to 8 rounds the cotangent stochastically, once for each product, along the axis that it contracts; the
        products stay floating point. None does not round.
      precision: as for `lax.dot_general`; None is the highest for float32 operands.

    Raises:
      ValueError: other dtypes or bits.
    """

    dtype: str | None = None
    bits: int | None = None
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self):
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
            if self.dtype not in ("float32", "bfloat16"):
                raise ValueError(f"gradient dtype must be float32 or bfloat16, got {self.dtype}; None takes that of x")
        if self.bits is not None:
            check_gradient_bits(self.bits)


def trainable_matmul(
    x: Float[Array, "*batch_and_free k"],
    w_hat: Float[Array, "*batch k n"],
    packed: BipolarArray,
    a_bits: int | BipolarFormat | None,
    *,
    gradient: GradientPrecision = GradientPrecision(),
    key: Array | None = None,
    implementation: str = "auto",
) -> Float[Array, "*batch_and_free n"]:
    """`matmul(x, packed, a_bits)`, differentiable by x and by w_hat.

    The value is that of `matmul` to the bit, so that training sees what inference computes. The gradient is
    straight-through. With x^ the quantized x and g the cotangent, the differentiated function is
    (x + stop_gradient(x^ - x)) @ w_hat:

    - dx = g @ packed^T, as if x had not been quantized;
    - dw_hat = x^^T @ g, in float32, which the caller's quantizer propagates to the weights.

    Derivatives of the gradient are those of this function too, with packed for w_hat. Forward mode is as for `matmul`.

    Args:
      x: as for `matmul`.
      w_hat: the numbers that `packed` represents, as a differentiable function of the trained weights. Only the
        gradient goes through it; its values are not used, and under `jit` never computed.
      packed: weights of w_hat's shape, axis -2.
      a_bits: as for `matmul`.
      gradient: precision of the backward pass.
      key: a PRNG key, for `gradient.bits`; a new one for each call.
      implementation: as for `matmul`.

    Returns:
      The product in x's dtype.

    Raises:
      ValueError: as `matmul`; gradient bits without a key.
    """
    if gradient.bits is not None and key is None:
        raise ValueError(f"gradients of {gradient.bits} bits are rounded stochastically: give a PRNG key")
    static = _Static(a_bits, gradient, implementation)
    x, w_hat, packed = vary_alike((x, w_hat, jax.lax.stop_gradient(packed)))
    product, batch = functools.partial(_product, static), packed.shape[:-2]
    if key is not None and batch:
        key = jax.random.split(key, batch)
    key_axis = None if key is None else 0
    for _ in batch:
        product = jax.vmap(product, in_axes=(0, 0, 0, key_axis))
    return product(x, w_hat, packed, key)


@dataclasses.dataclass(frozen=True)
class _Static:
    """The static operands of a product."""

    a_bits: int | BipolarFormat | None
    gradient: GradientPrecision
    implementation: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x, w_hat, packed, key):
    return fenced_matmul(x, packed, static.a_bits, static.implementation)


def fenced_matmul(
    x: Float[Array, "*batch_and_free k"], packed: BipolarArray, a_bits: int | BipolarFormat | None, implementation: str
) -> Float[Array, "*batch_and_free n"]:
    """`matmul`, which XLA may not fuse with the operations around it.

    In a fusion XLA may contract a multiplication and an addition of the epilogue, and round once where it otherwise
    rounds twice. Barriers keep training and inference equal to the bit.
    """
    # A barrier for each operand: layers that share x then have one operand, which is quantized once.
    x, packed = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(packed)
    return jax.lax.optimization_barrier(matmul(x, packed, a_bits, implementation=implementation))


def _forward(static, x, w_hat, packed, key):
    # The backward pass reads the packed weights. Their floats are for its own derivative; under `jit` a program that
    # does not differentiate it keeps none.
    return _product(static, x, w_hat, packed, key), (x, w_hat, packed, key)


def _backward(static, residuals, cotangent):
    x, w_hat, packed, key = residuals
    dtype = static.gradient.dtype or x.dtype
    rows = x.reshape(-1, x.shape[-1])
    by_token = by_column = cotangent.reshape(-1, cotangent.shape[-1])
    if static.gradient.bits is not None:
        token_key, column_key = jax.random.split(key)
        rows_of_cotangent = by_token.astype(jnp.float32)
        by_token, by_column = (
            straight_through(stochastic_round(by_token, static.gradient.bits, axis=axis, key=key), rows_of_cotangent)
            for axis, key in ((-1, token_key), (0, column_key))
        )
    x_hat = rows
    if static.a_bits is not None:
        a_format = activation_format(static.a_bits)
        x_hat = straight_through(quantize_tokens(rows, a_format).dequantize(a_format), rows.astype(jnp.float32))

    precision = static.gradient.precision
    if precision is None and jnp.dtype(dtype) == jnp.float32:
        precision = jax.lax.Precision.HIGHEST  # products of bfloat16 numbers are exact at every precision
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    with jax.named_scope("bipolar_matmul_gradient"):
        w = straight_through(packed.dequantize(), w_hat.astype(jnp.float32))
        dx = dot(by_token.astype(dtype), w.T.astype(dtype))
        # The barrier: XLA's CPU backend (jaxlib 0.11.2) has no bfloat16 product with a transposed constant.
        x_hat, by_column = jax.lax.optimization_barrier((x_hat.astype(dtype), by_column.astype(dtype)))
        dw_hat = dot(x_hat.T, by_column)
    return dx.astype(x.dtype).reshape(x.shape), dw_hat, None, None


_product.defvjp(_forward, _backward)

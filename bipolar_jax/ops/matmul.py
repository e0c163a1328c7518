"""The differentiable product of float activations with packed weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.epilogue import activate_and_add
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue, check_activation, check_prologue
from bipolar_jax.ops.compiled import as_array, compiled
from bipolar_jax.ops.dispatch import check_implementation, dispatch
from bipolar_jax.ops.explicit_sharding import mesh_axes, with_out_sharding
from bipolar_jax.ops.partitioned import is_distributed, partitioned
from bipolar_jax.ops.parts_of_k import PartsOfK, check_prologue_of_parts, part_of, parts_product
from bipolar_jax.packing import BipolarNumbers, BlockScaledArray
from bipolar_jax.quantize.groups import split_groups
from bipolar_jax.quantize.precision import activation_format
from bipolar_jax.quantize.rounding import check_float
from bipolar_jax.quantize.straight_through import straight_through


def matmul(
    x: Float[Array, "*batch columns"],
    w: BipolarNumbers,
    a_bits: int | BipolarFormat | None,
    *,
    bias: Float[Array, "*w_batch n"] | None = None,
    prologue: Prologue | None = None,
    residual: Float[Array, "*result out"] | None = None,
    activation: Activation | None = None,
    k_axes: str | tuple[str, ...] | None = None,
    token_axes: str | tuple[str, ...] | None = None,
    implementation: str = "auto",
) -> Float[Array, "*result out"]:
    """prologue(x) @ w, with the rows of prologue(x) quantized to `a_bits`; plus bias, activation and residual.

    Every row (token) is rounded to the a-bit grid that spans from its smallest to its largest number, zero included;
    one bit rounds to plus or minus its largest magnitude. See `kernels.semantics.activations`. The integer product of
    the values is exact. Scales, offsets, bias and activation follow in float32; the result is cast to x's dtype, in
    which the residual is added. NaN or Inf in a row of x makes that row of the result NaN or Inf. A row whose numbers
    are all below 2^-126 times the largest value counts as zeros.

    The gradient is straight-through. With x^ the quantized x and w^ = scale * v + offset, the differentiated function
    is (x + stop_gradient(x^ - x)) @ w^(scale, offset) + bias. With g the cotangent,

    - dx = g @ w^T, as if x had not been quantized;
    - dscale and doffset are those of w^ in the product with x^;
    - the packed bits and integer groups have no gradient (float0);
    - a prologue is differentiated as it is, with dx above as its cotangent;
    - the residual's gradient is g;
    - an activation is differentiated at the product, which is computed again; its gradient takes the place of g.

    Derivatives of the gradient are those of this function too, of any order. Forward mode (`jax.jvp`, `jax.jacfwd`,
    `jax.hessian`) raises JAX's TypeError, because the gradient is a `jax.custom_vjp`: use `jax.jacrev`, twice for a
    Hessian.

    On several devices a product within `jax.jit` partitions itself by the sharding of w (`packing.cuts.shard`), which
    stays where it is: n may be cut anywhere, k at ends of words and groups. Products of a w with batch axes, or of one
    that was prepared, do not: call those within `jax.shard_map`, as XLA gathers their operands.

    Args:
      x: float32, bfloat16 or float16; the last axis has k numbers, or as many as the prologue reduces to k. If w has
        batch axes, x's leading axes must equal them. Other leading axes may be empty.
      w: packed weights of logical shape (..., k, n): quantized with axis=-2, or the `T` of an array quantized with
        axis=-1; or a `BlockScaledArray`, whose float scales are made in every call. What their `unpack` and `prepare`
        make gives the same numbers, faster on CPUs and on Hopper GPUs.
      a_bits: activation bits 1..8, or their format, whose `span` may leave out the ends of a token's range; None leaves
        the activations float (weight-only).
      bias: added to every row; with or without w's batch axes.
      prologue: `RMSNorm`, `LayerNorm` or `Activation` of `bipolar_jax.ops`, computed in float32 in the pass over x
        that quantizes it; float activations are rounded to x's dtype after it. Its vectors have shape (k,), or w's
        batch axes before that.
      residual: of the shape and dtype of the result; added in the epilogue.
      activation: `Activation` of the product and its bias, in float32 before the cast (with float activations, after
        it). A gated one takes the first n / 2 columns as gates of the others, and makes n / 2 columns.
      k_axes: within `jax.shard_map`, the mesh axes that k is cut over: x has this device's part of every row, and w is
        cut as `packing.cuts.partition_specs` says. The result is that of whole rows, on every device, with the same
        bits (with float scales of groups up to the rounding of float32 sums); residual and bias are whole. There is no
        gradient.
      token_axes: within `jax.shard_map`, the mesh axes that the axis before the last is cut over. With `k_axes`, which
        are then the same, it is that axis of the result and of the residual: sums are reduce-scattered. Without, it is
        that of x: tokens are quantized where they are, their codes are gathered, and the result has all of them. There
        is no gradient.
      implementation: "auto", or a backend by name: "reference", "xla", "sm90" (Hopper GPUs).

    Returns:
      The product in x's dtype, with w's last axis, or what the activation makes of it, in place of x's.

    Raises:
      ValueError: x is not float, sizes do not fit, bits outside 1..8, or K so large that
        an int32 sum could overflow; with `k_axes` a w with batch axes, or a prologue that needs whole rows; with
        `token_axes` other `k_axes`, one axis alone, or tokens that do not divide.
      Unsupported: the backend asked for cannot serve these operands.
    """
    x = as_array(x)
    bias, residual = (None if array is None else as_array(array) for array in (bias, residual))
    check_implementation(implementation)
    a_format = None if a_bits is None else activation_format(a_bits)
    if k_axes is not None or token_axes is not None:
        k_axes, token_axes = ((axes,) if isinstance(axes, str) else axes for axes in (k_axes, token_axes))
        if token_axes is not None and k_axes not in (None, token_axes):
            raise ValueError(f"tokens are cut over {token_axes}, and k over {k_axes}: cut both over the same axes")
        cuts = {"cuts_k": k_axes is not None, "cuts_tokens": token_axes is not None}
        static = PartsOfK(
            tuple(k_axes or token_axes), a_format, activation, implementation, jnp.dtype(x.dtype).name, **cuts
        )
        return _matmul_of_parts(static, x, residual, w, bias, prologue)
    check_operands(x, w, a_format, bias, prologue, residual, activation)
    if 0 in x.shape:  # an empty batch
        columns = w.shape[-1] // (1 if activation is None else activation.parts)
        return jnp.zeros((*x.shape[:-1], columns), x.dtype)
    static = _Static(a_format, activation, implementation)
    if isinstance(w, BlockScaledArray):
        w = w.with_scales()
    integers = dataclasses.replace(w, scale=None, offset=None)
    operands = (x, residual, w.scale, w.offset, integers, bias, prologue)
    out_axes = (*mesh_axes(x)[:-1], mesh_axes(w.row_sums)[-2])
    return with_out_sharding(functools.partial(_batched_matmul, static), out_axes, operands)


def _matmul_of_parts(static: PartsOfK, x, residual, w, bias, prologue):
    """`matmul` with `k_axes` or `token_axes`."""
    axes, a_format, activation = static.axes, static.a_format, static.activation
    if w.ndim != 2:
        raise ValueError(
            f"with k_axes or token_axes w has no batch axes, got shape {w.shape}: map over them with jax.vmap"
        )
    part = _Whole(w, w.contracted_size)
    if static.cuts_k:
        check_prologue_of_parts(prologue, axes)
        part = part_of(w, x.shape[-1] // (1 if prologue is None else prologue.parts), axes)
    check_operands(x, part.w, a_format, bias, prologue, None, activation)
    if a_format is not None:
        check_contraction(part.k, part.w, a_format)
    columns = w.shape[-1] // (1 if activation is None else activation.parts)
    *batch, _ = x.shape
    if static.cuts_tokens:
        devices = jax.lax.axis_size(axes)
        if not batch or (static.cuts_k and batch[-1] % devices):
            raise ValueError(f"x of shape {x.shape} has no axis of tokens that {devices} devices divide")
        batch[-1] = batch[-1] // devices if static.cuts_k else batch[-1] * devices
    if residual is not None and (residual.shape, residual.dtype) != ((*batch, columns), x.dtype):
        raise ValueError(
            f"residual is {residual.dtype.name} of shape {tuple(residual.shape)}, the product {x.dtype.name} of shape "
            f"{(*batch, columns)}: they must be the same"
        )
    if 0 in x.shape:
        return jnp.zeros((*batch, columns), x.dtype)
    return parts_product(static, x, residual, w, bias, prologue)


class _Whole(NamedTuple):
    """Weights whose k is not cut, as `part_of` gives those whose k is."""

    w: BipolarNumbers
    k: int


@dataclasses.dataclass(frozen=True)
class _Static:
    """The static operands of a product."""

    a_format: BipolarFormat | None
    activation: Activation | None
    implementation: str


@compiled
def _batched_matmul(static, *operands):
    """Maps over the batch axes of w; a bias or a vector of the prologue that has none is the same for all."""
    product = functools.partial(_rows_matmul, static)
    *arrays, bias, prologue = operands
    scale = arrays[2]
    axes = jax.tree.map(lambda vector: None if vector.ndim == 1 else 0, (bias, prologue))
    for _ in range(scale.ndim - 2):
        product = jax.vmap(product, in_axes=(0,) * len(arrays) + axes)
    return product(*operands)


def _rows_matmul(static, *operands):
    x, residual, *others = vary_alike(operands)
    m = math.prod(x.shape[:-1])
    rows = x.reshape(m, x.shape[-1])
    residual = None if residual is None else residual.reshape(m, residual.shape[-1])
    product = _matmul(static, rows, residual, *others)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def vary_alike(operands):
    """Under shard_map, makes all operands vary over the same mesh axes.

    A custom_vjp must give each operand a cotangent that varies over the same axes as the operand. Where x is sharded
    and w is not, the gradient of w is a sum over devices: the transpose of this cast, outside the custom_vjp, makes it.
    """
    varying = frozenset().union(*map(_varying_axes, jax.tree.leaves(operands)))

    def cast(leaf):
        missing = tuple(varying - _varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, operands)


def _varying_axes(leaf) -> frozenset:
    return jax.typeof(leaf).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static: _Static, x, residual, scale, offset, integers, bias, prologue):
    w = dataclasses.replace(integers, scale=scale, offset=offset)
    operands = (x, residual, w, bias, prologue)
    return partitioned(_product, static, *operands) if is_distributed(operands, w) else _product(static, *operands)


def _product(static, x, residual, w, bias, prologue):
    """The product of rows and one matrix, by the backend that serves it."""
    with jax.named_scope("bipolar_matmul"):
        if static.a_format is None:
            x = _contracted(prologue, x).astype(x.dtype)
            return dispatch(
                static.implementation,
                lambda backend: backend.weight_only_matmul(x, w, bias, residual, static.activation),
            )
        return dispatch(
            static.implementation,
            lambda backend: backend.quantized_matmul(
                x, w, static.a_format, bias, prologue, residual, static.activation
            ),
        )


def _contracted(prologue, x):
    """The numbers that are quantized, float32."""
    return x.astype(jnp.float32) if prologue is None else prologue(x)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _activated(static, x, residual, *others):
    """The product with its activation as a step of its own, which `jax.vjp` differentiates."""
    product = _matmul(dataclasses.replace(static, activation=None), x, None, *others)
    return activate_and_add(product, static.activation, x.dtype, residual)


def _backward(static, operands, cotangent):
    if static.activation is not None:
        _, pull_back = jax.vjp(functools.partial(_activated, static), *operands)
        return pull_back(cotangent)
    x, residual, scale, offset, integers, bias, prologue = operands
    dresidual = None if residual is None else cotangent
    w = dataclasses.replace(integers, scale=scale, offset=offset)
    cotangent = cotangent.astype(jnp.float32)
    x_hat, pull_back = jax.vjp(_contracted, prologue, x)
    dprologue, dx = pull_back(jnp.dot(cotangent, w.dequantize().T, precision=jax.lax.Precision.HIGHEST))
    if static.a_format is None:
        x_hat = x_hat.astype(x.dtype).astype(jnp.float32)
    else:
        rounded = quantize_tokens(x_hat, static.a_format).dequantize(static.a_format)
        x_hat = straight_through(rounded, x_hat)
    dw = split_groups(jnp.dot(cotangent.T, x_hat, precision=jax.lax.Precision.HIGHEST), w.scale_group_size)
    values = split_groups(w.values().T.astype(jnp.float32), w.scale_group_size)
    dscale = jnp.sum(dw * values, axis=-1)
    doffset = None if offset is None else jnp.sum(dw, axis=-1)
    dbias = None if bias is None else jnp.sum(cotangent, axis=0).astype(bias.dtype)
    return dx, dresidual, dscale, doffset, None, dbias, dprologue


_matmul.defvjp(_forward, _backward)


def check_operands(x, w, a_format, bias, prologue=None, residual=None, activation=None) -> None:
    """Raises ValueError unless x, bias, prologue, residual and activation fit w, and the product fits int32."""
    if not isinstance(w, BipolarNumbers):
        raise ValueError(f"w must be a BipolarArray, got {type(w).__name__}: make one with bipolar_jax.quantize")
    check_float(x, "x")
    w.check()
    if w.axis != -2:
        raise ValueError(
            f"w of shape {w.shape} is packed along its last axis, but x @ w contracts the one before: "
            "pass w.T, or quantize with axis=-2"
        )
    *w_batch, k, n = w.shape
    if prologue is not None:
        check_prologue(prologue, k, tuple(w_batch))
    parts = 1 if prologue is None else prologue.parts
    if x.ndim < 1 or x.shape[-1] != parts * k:
        wanted = f"{k=}" if parts == 1 else f"{parts} * k = {parts * k}, gates first"
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit w of shape {w.shape}: x's last axis must be {wanted}"
        )
    if x.ndim < w.ndim - 1 or list(x.shape[: len(w_batch)]) != w_batch:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit the batch axes {tuple(w_batch)} of w: they must lead x's shape"
        )
    if bias is not None and bias.shape not in ((n,), (*w_batch, n)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, w of shape {w.shape} needs {(*w_batch, n)} or {(n,)}")
    if activation is not None:
        check_activation(activation, n)
        n //= activation.parts
    if residual is not None and (residual.shape, residual.dtype) != ((*x.shape[:-1], n), x.dtype):
        raise ValueError(
            f"residual is {residual.dtype.name} of shape {tuple(residual.shape)}, the product "
            f"{x.dtype.name} of shape {(*x.shape[:-1], n)}: they must be the same"
        )
    if a_format is not None:
        check_contraction(k, w, a_format)


def check_contraction(k: int, w: BipolarNumbers, a_format: BipolarFormat) -> None:
    """Raises ValueError if int32 sums over a scale of w, of k products at most, could overflow."""
    terms = min(k, w.scale_group_size or k)
    if terms > w.max_contraction(a_format):
        raise ValueError(
            f"W{w.format.name}A{a_format.name} sums {terms} products, and int32 is exact only up to "
            f"{w.max_contraction(a_format)}: use fewer bits, or quantize w with float scales and a group_size "
            "below that"
        )

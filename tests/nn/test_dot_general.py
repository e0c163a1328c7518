"""`DotGeneral` equals `lax.dot_general` of the quantized operands: values, gradients, vmap; many layouts and dtypes."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, DotGeneral, fake_quant
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens

# name: lhs shape, rhs shape, ((lhs contracting, rhs contracting), (lhs batch, rhs batch))
LAYOUTS = {
    "Dense": ((5, 24), (24, 6), (((1,), (0,)), ((), ()))),
    "Dense of three axes": ((2, 3, 24), (24, 6), (((2,), (0,)), ((), ()))),
    "Dense of four axes": ((2, 2, 2, 24), (24, 6), (((3,), (0,)), ((), ()))),
    "one vector": ((24,), (24, 6), (((0,), (0,)), ((), ()))),
    "kernel transposed": ((5, 24), (6, 24), (((1,), (1,)), ((), ()))),
    "contracted first on both": ((24, 5), (24, 6), (((0,), (0,)), ((), ()))),
    "lhs transposed": ((24, 5), (6, 24), (((0,), (1,)), ((), ()))),
    "contracted in the middle": ((3, 24, 2), (4, 24, 2), (((1,), (1,)), ((), ()))),
    "vector as kernel": ((5, 24), (24,), (((1,), (0,)), ((), ()))),
    "two vectors": ((24,), (24,), (((0,), (0,)), ((), ()))),
    "no contraction": ((5,), (6,), (((), ()), ((), ()))),
    "contraction of one": ((5, 1), (1, 6), (((1,), (0,)), ((), ()))),
    "odd sizes": ((3, 37), (37, 5), (((1,), (0,)), ((), ()))),
    "query of heads": ((2, 3, 24), (24, 4, 3), (((2,), (0,)), ((), ()))),
    "output of heads": ((2, 3, 4, 6), (4, 6, 5), (((2, 3), (0, 1)), ((), ()))),
    "two contracted, other order": ((3, 4, 6), (6, 4, 5), (((1, 2), (1, 0)), ((), ()))),
    "two contracted, apart": ((4, 3, 6), (4, 5, 6), (((0, 2), (0, 2)), ((), ()))),
    "three contracted": ((2, 2, 3, 4), (2, 3, 4, 5), (((1, 2, 3), (0, 1, 2)), ((), ()))),
    "batch": ((3, 5, 24), (3, 24, 6), (((2,), (1,)), ((0,), (0,)))),
    "batch without rows": ((3, 24), (3, 24, 6), (((1,), (1,)), ((0,), (0,)))),
    "batch in the middle": ((5, 3, 24), (24, 3, 6), (((2,), (0,)), ((1,), (1,)))),
    "batch last": ((24, 5, 3), (6, 24, 3), (((0,), (1,)), ((2,), (2,)))),
    "two batch axes": ((2, 3, 5, 24), (2, 3, 24, 6), (((3,), (2,)), ((0, 1), (0, 1)))),
    "two batch axes, crossed": ((2, 3, 5, 24), (3, 2, 24, 6), (((3,), (2,)), ((0, 1), (1, 0)))),
    "batch and two contracted": ((3, 2, 4, 6), (3, 4, 6, 5), (((2, 3), (1, 2)), ((0,), (0,)))),
    "batch only": ((3,), (3,), (((), ()), ((0,), (0,)))),
    "attention's logits": ((2, 5, 3, 8), (2, 7, 3, 8), (((3,), (3,)), ((0, 2), (0, 2)))),
    "attention's values": ((2, 3, 5, 7), (2, 7, 3, 8), (((3,), (1,)), ((0, 1), (0, 2)))),
}
PRECISIONS = {
    "W1A1": DotGeneral(1, 1),
    "W2A4": DotGeneral(2, 4),
    "W4A8g5 minmax": DotGeneral(4, 8, 5, "minmax"),
    "W4A8g5f minmax": DotGeneral(4, 8, 5, "minmax", scales="float"),
    "W1.58A8": DotGeneral(TERNARY, 8),
    "W3A16": DotGeneral(3),
}
DTYPES = {
    "f32": (jnp.float32, jnp.float32, None),
    "bf16": (jnp.bfloat16, jnp.bfloat16, None),
    "f16": (jnp.float16, jnp.float16, None),
    "bf16 to f32": (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    "f32 to bf16": (jnp.float32, jnp.float32, jnp.bfloat16),
    "bf16 by f32": (jnp.bfloat16, jnp.float32, None),
}
NAMES = list(PRECISIONS)
# Every layout at two precisions, in turn; every dtype at three layouts.
CASES = [(layout, NAMES[(i + j) % len(NAMES)], "f32") for i, layout in enumerate(LAYOUTS) for j in (0, 2)]
CASES += [
    (layout, ("W2A4", "W3A16")[i % 2], dtype)
    for i, dtype in enumerate(DTYPES)
    for layout in ("Dense", "output of heads", "batch in the middle")
    if dtype != "f32"
]
every_case = pytest.mark.parametrize(("layout", "precision", "dtype"), CASES, ids=["-".join(case) for case in CASES])


def normal(seed: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(seed.encode())).normal(size=shape).astype(np.float32)


def rounded_tokens(x, contracting, a_bits):
    """x with every token rounded, with a straight-through gradient; independent of `Contraction`."""
    if a_bits is None:
        return x.astype(jnp.float32)
    kept = [i for i in range(x.ndim) if i not in contracting]
    order = [*kept, *contracting]
    rows = jnp.transpose(x, order).reshape(-1, int(np.prod([x.shape[i] for i in contracting])))
    rounded = quantize_tokens(rows, BipolarFormat(a_bits)).dequantize(BipolarFormat(a_bits))
    rounded = jnp.transpose(rounded.reshape([x.shape[i] for i in order]), np.argsort(order))
    x = x.astype(jnp.float32)
    return x + jax.lax.stop_gradient(rounded - x)


def rounded_weights(w, contracting, batch, dot: DotGeneral):
    """w rounded, with the gradient of `fake_quant`; independent of `Contraction`."""
    free = [i for i in range(w.ndim) if i not in {*contracting, *batch}]
    order = [*batch, *free, *contracting]
    sizes = [w.shape[i] for i in order]
    size = lambda axes: int(np.prod([w.shape[i] for i in axes]))  # noqa: E731
    rows = jnp.transpose(w, order).reshape(size(batch), size(free), size(contracting)).astype(jnp.float32)
    rounded = fake_quant(rows, dot.w_bits, -1, dot.group_size, dot.calibration, scales=dot.scales)
    return jnp.transpose(rounded.reshape(sizes), np.argsort(order))


def on_quantized_operands(dot: DotGeneral, numbers, preferred):
    """A function that rounds both operands and calls `lax.dot_general`."""
    (x_contracting, w_contracting), (_, w_batch) = numbers

    def product(lhs, rhs):
        dtype = preferred or np.promote_types(lhs.dtype, rhs.dtype)
        lhs = rounded_tokens(lhs, x_contracting, dot.a_bits)
        rhs = rounded_weights(rhs, w_contracting, w_batch, dot)
        return jax.lax.dot_general(lhs, rhs, numbers, precision="highest").astype(dtype)

    return product


def prepared(layout: str, precision: str, dtype: str):
    """The product of `DotGeneral`, its counterpart, the operands, and eps of the narrowest dtype."""
    lhs_shape, rhs_shape, numbers = LAYOUTS[layout]
    lhs_dtype, rhs_dtype, preferred = DTYPES[dtype]
    dot = PRECISIONS[precision]
    contracted = int(np.prod([rhs_shape[i] for i in numbers[0][1]]))
    if dot.group_size and dot.group_size > contracted:
        dot = dataclasses.replace(dot, group_size=contracted)
    lhs, rhs = normal(layout, *lhs_shape).astype(lhs_dtype), normal(layout + "w", *rhs_shape).astype(rhs_dtype)
    ours = lambda lhs, rhs: dot(lhs, rhs, numbers, preferred_element_type=preferred)  # noqa: E731
    eps = max(float(jnp.finfo(d).eps) for d in DTYPES[dtype] if d is not None)
    return ours, on_quantized_operands(dot, numbers, preferred), lhs, rhs, eps


def assert_same(ours, theirs, eps):
    """Tolerance: float32 sums of at most 60 products, and one rounding to the narrowest dtype."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    theirs = np.asarray(theirs, np.float32)
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=4 * eps, atol=8 * eps * np.abs(theirs).max())


@functools.cache
def outcomes(layout: str, precision: str, dtype: str):
    """(value, gradients, vmapped values) of the product and of its counterpart, each compiled once; and eps."""
    ours, theirs, lhs, rhs, eps = prepared(layout, precision, dtype)
    cotangent = normal("cotangent", *jax.eval_shape(theirs, lhs, rhs).shape)
    stack = lambda a: jnp.stack([a, -2 * a, a * a])  # noqa: E731
    # Every other case maps over the weights too.
    axes, operands = ((0, None), (stack(lhs), rhs)) if len(layout) % 2 else ((0, 0), (stack(lhs), stack(rhs)))

    def everything(product):
        loss = lambda *operands: jnp.sum(product(*operands).astype(jnp.float32) * cotangent)  # noqa: E731
        run = lambda lhs, rhs, operands: (  # noqa: E731
            product(lhs, rhs),
            jax.grad(loss, argnums=(0, 1))(lhs, rhs),
            jax.vmap(product, axes)(*operands),
        )
        return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(lhs, rhs, operands)

    return everything(ours), everything(theirs), eps


@every_case
@pytest.mark.sample(2)
def test_product(layout, precision, dtype):
    (ours, *_), (theirs, *_), eps = outcomes(layout, precision, dtype)
    lhs, rhs, numbers = LAYOUTS[layout]
    lhs_dtype, rhs_dtype, preferred = DTYPES[dtype]
    plain = jax.eval_shape(
        lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, numbers, preferred_element_type=preferred),
        jax.ShapeDtypeStruct(lhs, lhs_dtype),
        jax.ShapeDtypeStruct(rhs, rhs_dtype),
    )
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    assert_same(ours, theirs, eps)


@every_case
@pytest.mark.sample(2)
def test_gradient(layout, precision, dtype):
    (_, ours, _), (_, theirs, _), eps = outcomes(layout, precision, dtype)
    assert [gradient.dtype for gradient in ours] == list(DTYPES[dtype][:2])
    for gradient, other in zip(ours, theirs, strict=True):
        assert_same(gradient, other, eps)


@every_case
@pytest.mark.sample(2)
def test_vmap(layout, precision, dtype):
    (*_, ours), (*_, theirs), eps = outcomes(layout, precision, dtype)
    assert_same(ours, theirs, eps)

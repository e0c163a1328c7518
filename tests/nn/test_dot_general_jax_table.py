"""`DotGeneral` on the table of shapes and dtypes that JAX tests `lax.dot_general` with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from tests.support.integer_products import normal

# Shapes and dimension numbers of jax/tests: lax_test.py, lax_vmap_test.py and lax_autodiff_test.py.
CONTRACT = [
    ((5,), (5,), [0], [0]),
    ((5, 7), (5,), [0], [0]),
    ((7, 5), (5,), [1], [0]),
    ((3, 5), (2, 5), [1], [1]),
    ((5, 3), (5, 2), [0], [0]),
    ((5, 3, 2), (5, 2, 4), [0], [0]),
    ((5, 3, 2), (5, 2, 4), [0, 2], [0, 1]),
    ((5, 3, 2), (3, 5, 2, 4), [0, 2], [1, 2]),
    ((1, 2, 2, 3), (1, 2, 3, 1), [1], [1]),
    ((3, 2), (2, 4), [1], [0]),
]
CONTRACT_AND_BATCH = [
    ((3, 3, 2), (3, 2, 4), (([2], [1]), ([0], [0]))),
    ((3, 3, 2), (2, 3, 4), (([2], [0]), ([0], [1]))),
    ((3, 4, 2, 4), (3, 4, 3, 2), (([2], [3]), ([0, 1], [0, 1]))),
    ((3, 5, 2), (2, 4, 5), (([2], [0]), ([1], [2]))),
    ((7, 3, 5, 2), (2, 2, 4, 5), (([3], [0]), ([2], [3]))),
]
# `lax.dot`, and scalars (the case of issue 10818).
DOT = [(lhs, rhs, [len(lhs) - 1], [0]) for lhs in ((3,), (4, 3)) for rhs in ((3,), (3, 6))] + [((), (), [], [])]
LAYOUTS = [(lhs, rhs, ((x, w), ([], []))) for lhs, rhs, x, w in (*CONTRACT, *DOT)] + CONTRACT_AND_BATCH
# Operand and preferred result: JAX's pairs of float dtypes, and a narrower or no preferred one.
DTYPES = [
    ("float16", "float16"),
    ("float16", "float32"),
    ("float16", "float64"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "float64"),
    ("float32", "float32"),
    ("float32", "float64"),
    ("float32", None),
    ("bfloat16", None),
    ("float16", None),
    ("float32", "bfloat16"),
]
W8A8 = bj.DotGeneral(8, 8, calibration="absmax")
MAPPED = [(0, None), (None, -1), (-1, 0)]
every_layout = pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
# Those with no counterpart in test_dot_general.py, which has numbers and gradients of its layouts at low bits.
NUMBERS = [LAYOUTS[i] for i in (7, 8, 14, 18, 19)]


def with_axis(shape: tuple, axis: int | None) -> tuple:
    """The shape with a mapped axis of 5; -1 is the last."""
    return shape if axis is None else (*shape, 5) if axis == -1 else (5, *shape)


@every_layout
@pytest.mark.sample(2)
def test_shape_and_dtype(index):
    """Of every layout at two pairs of dtypes: of every pair at three layouts or more."""
    lhs, rhs, numbers = LAYOUTS[index]
    for shift in (0, 7):
        dtype, preferred = DTYPES[(index + shift) % len(DTYPES)]
        operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (lhs, rhs)]
        with jax.enable_x64(preferred == "float64"):
            ours, theirs = (
                jax.eval_shape(
                    lambda x, w, dot=dot, preferred=preferred: dot(x, w, numbers, preferred_element_type=preferred),
                    *operands,
                )
                for dot in (W8A8, jax.lax.dot_general)
            )
        assert ours == theirs, (dtype, preferred)


@every_layout
@pytest.mark.sample(2)
def test_mapped_over_an_axis(index):
    lhs, rhs, numbers = LAYOUTS[index]
    for axes in (MAPPED[index % 3], MAPPED[(index + 1) % 3]):
        operands = [
            jax.ShapeDtypeStruct(with_axis(shape, axis), "float32")
            for shape, axis in zip((lhs, rhs), axes, strict=True)
        ]
        ours, theirs = (
            jax.eval_shape(jax.vmap(lambda x, w, dot=dot: dot(x, w, numbers), axes), *operands)
            for dot in (W8A8, jax.lax.dot_general)
        )
        assert ours == theirs, axes


@pytest.mark.parametrize(("lhs", "rhs", "numbers"), NUMBERS, ids=str)
def test_numbers_and_gradients_are_near_the_float_ones(lhs, rhs, numbers):
    """A step of 8 bits is 1/127 of the largest weight of a channel, and 1/255 of a token's range."""
    x, w = jnp.asarray(normal(1, *lhs)[0]), jnp.asarray(normal(1, *rhs, seed=1)[0])

    @jax.jit
    def both(x, w):
        results = [jax.vjp(lambda x, w, dot=dot: dot(x, w, numbers), x, w) for dot in (W8A8, jax.lax.dot_general)]
        return [(y, gradient(jnp.ones_like(y))) for y, gradient in results]

    ours, theirs = both(x, w)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=0.02 * float(jnp.abs(other).max()))


def test_a_preferred_float64_is_the_float32_result_widened():
    x, w = normal(3, 5), normal(5, 2, seed=1)
    numbers = (([1], [0]), ([], []))
    with jax.enable_x64(True):
        wide, pullback = jax.vjp(lambda x: W8A8(x, w, numbers, preferred_element_type=jnp.float64), x)
        (gradient,) = jax.eval_shape(pullback, wide)
    assert (wide.dtype, gradient.dtype) == (jnp.float64, jnp.float32)
    np.testing.assert_array_equal(wide, W8A8(x, w, numbers))


@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64"])
def test_dtypes_that_are_not_float_are_refused(dtype):
    x = jnp.ones((3, 5), dtype)
    with pytest.raises(ValueError, match=f"must be float32, bfloat16, float16, got {dtype}"):
        W8A8(x, x, (([1], [1]), ([], [])))

"""`DotGeneral` under transformations of JAX and Flax, in einsums and attention, at sizes of zero; its errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import bipolar_jax as bj
from bipolar_jax.nn import LinenDotGeneral, QuantizedEinsum, StatefulDotGeneral
from bipolar_jax.ops import GradientPrecision
from tests.support.integer_products import normal
from tests.support.training import train

W2A4 = bj.DotGeneral(2, 4, calibration="mse")
DENSE = (((1,), (0,)), ((), ()))
K, N = 24, 24
AUTO = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
EXPLICIT = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))


X, W = normal(4, K), normal(K, N, seed=1)


def loss(x, w, dot=W2A4):
    return jnp.sum(jnp.tanh(dot(x, w, DENSE)) ** 2)


def assert_close(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.fixture(scope="module")
def expected():
    """Gradient of the plain function, jitted."""
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(X, W)


def test_the_product_is_matmul_to_the_bit():
    ours = jax.jit(lambda x, w: W2A4(x, w, DENSE))(X, W)
    theirs = jax.jit(lambda x, w: bj.matmul(x, w, 4))(X, bj.quantize(W, 2, 0, calibration="mse"))
    np.testing.assert_array_equal(ours, theirs)


def test_training_runs_the_given_backend(monkeypatch):
    called = []
    backend = bj.ops.dispatch.BACKENDS["reference"]
    spy = lambda *a: called.append(1) or backend.quantized_matmul(*a)  # noqa: E731
    functions = {"quantized_matmul": staticmethod(spy), "pack_weights": staticmethod(backend.pack_weights)}
    stub = type("stub", (), functions)
    monkeypatch.setitem(bj.ops.dispatch.BACKENDS, "reference", stub)
    jax.eval_shape(lambda: jax.grad(loss)(X, W, bj.DotGeneral(2, 4, implementation="reference")))
    assert called


def test_eager_equals_jit(expected):
    assert_close(jax.grad(loss, argnums=(0, 1))(X, W), expected)


def test_remat(expected):
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(X, W), expected)


def test_vmap_of_grad(expected):
    xs = jnp.stack([X, 2 * X])
    found = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), (0, None)))(xs, W)
    assert_close([leaf[0] for leaf in found], expected)


def test_scan_over_layers():
    ws = normal(3, K, K, seed=2)

    def scanned(x, ws):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(W2A4(x, w, DENSE)), None))
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    def plain(x, ws):
        for w in ws:
            x = jnp.tanh(W2A4(x, w, DENSE))
        return jnp.sum(x)

    assert_close(*(jax.jit(jax.grad(f, argnums=(0, 1)))(X, ws) for f in (scanned, plain)))


@pytest.mark.parametrize(
    ("x_spec", "w_spec"), [(P("d"), P()), (P(), P(None, "d"))], ids=["data parallel", "tensor parallel"]
)
def test_shard_map(expected, x_spec, w_spec):
    sharded = jax.shard_map(
        lambda x, w: jax.lax.psum(loss(x, w), "d"), mesh=AUTO, in_specs=(x_spec, w_spec), out_specs=P()
    )
    assert_close(jax.jit(jax.grad(sharded, argnums=(0, 1)))(X, W), expected)


def test_out_sharding_on_an_explicit_mesh():
    with jax.set_mesh(EXPLICIT):
        x = jax.device_put(X, jax.NamedSharding(EXPLICIT, P("d")))
        y = jax.jit(lambda x, w: W2A4(x, w, DENSE, out_sharding=P("d")))(x, W)
        assert y.sharding.spec == P("d", None)
    assert_close(np.asarray(y), jax.jit(lambda x, w: W2A4(x, w, DENSE))(X, W))


@pytest.mark.parametrize("stateful", [False, True])
def test_nnx_jit_trains_a_layer(stateful):
    layer = nnx.Linear(K, 8, rngs=nnx.Rngs(0))
    layer.dot_general = W2A4
    if stateful:
        dot = bj.DotGeneral(2, 4, gradient=GradientPrecision(bits=8))
        dot = StatefulDotGeneral(dot, layer.kernel[...], learned_steps=True, rngs=nnx.Rngs(gradient=1))
        layer.dot_general = nnx.data(dot)
        before = np.asarray(dot.step_size[...])
    losses = train(layer, normal(64, K), normal(64, 8, seed=3), steps=20)
    assert losses[-1] < 0.9 * losses[0]
    if stateful:
        assert np.all(np.asarray(dot.step_size[...]) != before)
        assert dot.rngs.count[...] == 20  # a key for every step


def test_nnx_scan_over_stacked_layers():
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(K, K, dot_general=W2A4, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    stack, y = make(nnx.Rngs(0).split(3)), X
    for i in range(3):
        y = W2A4(y, stack.kernel[i], DENSE) + stack.bias[i][None]
    # A number near the middle of two 4-bit values may be rounded to either: few outputs differ.
    assert np.mean(np.abs(nnx.jit(forward)(X, stack) - y) > 1e-3) < 0.1


class Block(linen.Module):
    make: object

    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(K, dot_general_cls=self.make)(x)), None


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(bj.DotGeneral, 2, 4),
        functools.partial(LinenDotGeneral, bj.DotGeneral(2, 4, gradient=GradientPrecision(bits=8)), learned_steps=True),
    ],
    ids=["DotGeneral", "LinenDotGeneral"],
)
def test_linen_scan_with_remat(make):
    stack = linen.scan(
        linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True, "gradient": True}, length=3
    )(make)
    variables = stack.init(jax.random.key(0), X, None)
    assert variables["params"]["Dense_0"]["kernel"].shape == (3, K, K)

    @jax.jit
    def gradient(variables, key):
        return jax.grad(lambda v: jnp.sum(stack.apply(v, X, None, rngs={"gradient": key})[0] ** 2))(variables)

    found = gradient(variables, jax.random.key(1))
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert all(np.all(np.abs(leaf).sum(axis=tuple(range(1, leaf.ndim))) > 0) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape"),
    [
        ("nta,hab->nthb", (2, 3, 8), (4, 8, 5)),
        ("nta,ab->nbt", (2, 3, 8), (8, 5)),
        ("hna,hab->nhb", (4, 2, 8), (4, 8, 5)),
        ("nxa,ab->nb", (2, 3, 8), (8, 5)),
        ("...a,ab->...b", (2, 3, 8), (8, 5)),
    ],
)
def test_einsum(subscripts, x_shape, w_shape):
    """Close to the float result at W8A8. In the second case jnp.einsum would swap the operands."""
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    layer = nnx.Einsum(subscripts, w_shape, einsum_op=QuantizedEinsum(bj.DotGeneral(8, 8)), rngs=nnx.Rngs(0))
    layer.kernel[...] = w
    expected = np.einsum(subscripts, x, w)
    found = nnx.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert np.any(found != expected)


def test_weights_may_be_the_left_operand():
    dot = bj.DotGeneral(2, 4, weights="lhs")
    x, w = normal(3, 5, K), normal(3, K, 6, seed=1)
    ours = dot(w, x, (((1,), (2,)), ((0,), (0,))))
    theirs = bj.DotGeneral(2, 4)(x, w, (((2,), (1,)), ((0,), (0,))))
    np.testing.assert_array_equal(ours, jnp.swapaxes(theirs, 1, 2))


def test_attention_uses_it_in_projections_only():
    calls = []

    def spy(lhs, rhs, *args, **kwargs):
        calls.append(rhs.shape)
        return bj.DotGeneral(8, 8)(lhs, rhs, *args, **kwargs)

    attention = nnx.MultiHeadAttention(2, 8, qkv_dot_general=spy, out_dot_general=spy, decode=False, rngs=nnx.Rngs(0))
    nnx.eval_shape(lambda: attention(normal(1, 3, 8)))
    assert calls == [(8, 2, 4)] * 3 + [(2, 4, 8)]


def test_a_product_of_activations_quantizes_both():
    q, k = normal(2, 5, 3, 8), normal(2, 7, 3, 8, seed=1)
    attend = functools.partial(linen.dot_product_attention_weights, q, k)
    ours, exact = attend(einsum_dot_general=bj.DotGeneral(8, 8)), attend()
    np.testing.assert_allclose(ours, exact, atol=0.02)
    assert np.any(ours != exact)


def test_sizes_of_zero_give_what_jax_gives():
    for x, w in ((np.zeros((0, 3)), np.zeros((3, 4))), (np.zeros((2, 0)), np.zeros((0, 4)))):
        x, w = x.astype(np.float32), w.astype(np.float32)
        np.testing.assert_array_equal(W2A4(x, w, DENSE), jax.lax.dot_general(x, w, DENSE))


def test_the_backward_pass_takes_its_dtype():
    gradient = lambda dtype: jax.grad(loss)(X, W, bj.DotGeneral(2, 4, gradient=GradientPrecision(dtype)))  # noqa: E731
    exact, rounded = gradient("float32"), gradient("bfloat16")
    assert 0 < np.abs(exact - rounded).max() < 0.02 * np.abs(exact).max()


def test_quantized_gradients_are_right_on_average():
    """The mean over 400 keys is within 5 standard errors of the float gradient."""
    dot = bj.DotGeneral(4, gradient=GradientPrecision(bits=2))
    cotangent = normal(4, N, seed=5)
    grad = lambda dot, **kw: jax.grad(  # noqa: E731
        lambda x, w: jnp.sum(dot(x, w, DENSE, **kw) * cotangent), argnums=(0, 1)
    )
    keys = jax.random.split(jax.random.key(0), 400)
    found = jax.jit(jax.vmap(lambda key: grad(dot, key=key)(X, W)))(keys)
    exact = grad(bj.DotGeneral(4))(X, W)
    for samples, mean in zip(found, exact, strict=True):
        error = np.abs(samples.mean(axis=0) - mean)
        assert np.all(error < 5 * samples.std(axis=0) / 20 + 1e-5)
        assert samples.std() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bj.DotGeneral(9), "from 1 to 8, got 9"),
        (lambda: bj.DotGeneral(2, 0), "from 1 to 8, got 0"),
        (lambda: bj.DotGeneral(4, calibration="absmean"), 'absmean" is for 1 bit and ternary weights, got 4'),
        (lambda: bj.DotGeneral(2, weight_norm="unit"), "center or standardize, got 'unit'"),
        (lambda: bj.DotGeneral(2, weights="kernel"), '"rhs" or "lhs", got \'kernel\''),
        (lambda: bj.DotGeneral(2, implementation="cuda"), "got 'cuda'"),
        (lambda: GradientPrecision("float16"), "float32 or bfloat16, got float16"),
        (lambda: GradientPrecision(bits=1), "from 2 to 8, got 1"),
        (lambda: W2A4(X.astype(np.int32), W, DENSE), "lhs must be float32, bfloat16, float16, got int32"),
        (lambda: bj.DotGeneral(2, 4, group_size=99)(X, W, DENSE), "contracted size 24, got 99"),
        (lambda: bj.DotGeneral(2, gradient=GradientPrecision(bits=8))(X, W, DENSE), "8 bits .* give a PRNG key"),
        (lambda: W2A4(X, W, DENSE, step_size=jnp.ones(3)), r"step sizes have shape \(3,\).*need \(24, 1\)"),
        (lambda: W2A4(X, W * np.nan, DENSE), "576 NaN or Inf"),
        (lambda: QuantizedEinsum(W2A4)("aa,ab->b", W, W), "index twice"),
        (lambda: QuantizedEinsum(W2A4)("na,ab->n", X, W), r"sums the weights alone over \['b'\]"),
        (lambda: StatefulDotGeneral(W2A4, W), "use the DotGeneral itself"),
        (lambda: StatefulDotGeneral(W2A4, W, rngs=nnx.Rngs(0)), "gradient bits are None and rngs are given"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dimension_numbers_that_do_not_fit_raise_the_error_of_jax():
    with pytest.raises(TypeError, match=r"contracting dimensions to have the same shape"):
        W2A4(X, W[:5], DENSE)

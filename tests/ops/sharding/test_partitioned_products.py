"""Products cut over the devices of a mesh: the bits of one device, and no packed weights in what devices exchange."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bipolar_jax as bj
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops import Activation, RMSNorm
from bipolar_jax.packing.cuts import partition_specs, shard
from experiments.distributed.collectives import collectives
from tests.support.integer_products import normal

M, K, N = 4, 128, 12
X, KERNEL, BIAS, RESIDUAL = normal(M, K), normal(K, N, seed=1), normal(N, seed=2), normal(M, N, seed=3)
X[1, 5], X[2, 70] = 40.0, -25.0  # the extremes of some tokens are on the other device
MESH = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
EXACT = {
    "W4A8": ({"bits": 4}, 8),  # with offsets: sums of tokens are reduced too
    "W4A8g32": ({"bits": 4, "group_size": 32}, 8),
    "W2A2": ({"bits": 2}, 2),
    "W1A1": ({"bits": 1}, 1),
    "W8A8": ({"bits": 8}, 8),
    "W1.58A8g64": ({"bits": bj.TERNARY, "group_size": 64}, 8),
}
EXTREMES, SUMS = ("all-reduce", "f32[4,2]"), ("all-reduce", "s32[4,12]")


def packed(name: str) -> tuple[bj.BipolarArray, int]:
    options, a_bits = EXACT[name]
    return bj.quantize(KERNEL, axis=0, **options), a_bits


def compiled(function, *operands):
    """The result, and what devices exchange."""
    program = jax.jit(function).lower(*operands).compile()
    return np.asarray(program(*operands)), collectives(program)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.sample(1)
def test_products_of_k_cut_have_the_bits_of_one_device(name):
    w, a_bits = packed(name)
    expected = bj.matmul(X, w, a_bits, bias=BIAS, residual=RESIDUAL)

    def product(x, w, **options):
        return bj.matmul(x, w, a_bits, bias=BIAS, residual=RESIDUAL, **options)

    by_hand = jax.shard_map(
        functools.partial(product, k_axes="model"),
        mesh=MESH,
        in_specs=(P(None, "model"), partition_specs(w, P("model"))),
        out_specs=P(),
    )
    sums = ("all-reduce", "s32[4] s32[4,12]") if w.offset is not None else SUMS
    for function, cut in ((by_hand, w), (product, shard(w, MESH, P("model")))):
        found, exchanged = compiled(function, X, cut)
        np.testing.assert_array_equal(found, expected)
        assert exchanged == [EXTREMES, sums]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.sample(2)
def test_cut_tokens_have_the_bits_of_one_device(name):
    """Sums of k are scattered over the tokens of each text; codes of tokens are gathered for columns."""
    w, a_bits = packed(name)
    x, residual = (jnp.stack([each, each[::-1]]) for each in (X, RESIDUAL))
    norm, w_of_column = RMSNorm(jnp.ones(K), 1e-5), shard(w, MESH, P(None, "model"))
    expected = bj.matmul(x, w, a_bits, bias=BIAS, residual=residual)
    options = {"a_bits": a_bits, "token_axes": "model"}
    scattered = jax.shard_map(
        lambda x, residual, w: bj.matmul(x, w, bias=BIAS, residual=residual, k_axes="model", **options),
        mesh=MESH,
        in_specs=(P(None, None, "model"), P(None, "model"), partition_specs(w, P("model"))),
        out_specs=P(None, "model"),
    )
    found, exchanged = compiled(scattered, x, residual, shard(w, MESH, P("model")))
    np.testing.assert_array_equal(found, expected)
    sums = ["s32[4,12]", "s32[4]"] if w.offset is not None else ["s32[4,12]"]
    assert exchanged == [("all-reduce", "f32[8,2]"), *(("reduce-scatter", shape) for shape in sums)]
    gathered = jax.shard_map(
        lambda x, w: bj.matmul(x, w, prologue=norm, **options),
        mesh=MESH,
        in_specs=(P(None, "model"), partition_specs(w, P(None, "model"))),
        out_specs=P(None, None, "model"),
        check_vma=False,
    )
    found, exchanged = compiled(gathered, x, w_of_column)
    np.testing.assert_array_equal(found, bj.matmul(x, w, a_bits, prologue=norm))
    codes = f"u8[8,{K}]" if a_bits == 8 else f"u32[{a_bits},8,{K // 32}]"
    assert {kind for kind, _ in exchanged} == {"all-gather"}
    assert set(" ".join(shapes for _, shapes in exchanged).split()) == {codes, "s32[8,3]"}


@pytest.mark.covered("the products above, by the same partition")
def test_unpacked_weights_are_cut_likewise():
    w, a_bits = packed("W4A8g32")
    found, exchanged = compiled(lambda x, w: bj.matmul(x, w, a_bits), X, shard(w.unpack(), MESH, P("model")))
    np.testing.assert_array_equal(found, bj.matmul(X, w, a_bits))
    assert exchanged == [EXTREMES, SUMS]


@pytest.mark.parametrize("group_size", [32, K // 2], ids=["groups", "one group a device"])
def test_groups_with_float_scales_add_up_within_their_rounding(group_size):
    w = bj.quantize(KERNEL, 4, axis=0, group_size=group_size, scales="float")
    found, exchanged = compiled(lambda x, w: bj.matmul(x, w, 8), X, shard(w, MESH, P("model")))
    magnitudes = np.abs(X) @ np.abs(w.dequantize())
    assert (np.abs(found - bj.matmul(X, w, 8)) <= 4 * 2.0**-24 * 1.1 * magnitudes).all()
    assert exchanged == [("all-reduce", "f32[4,12]"), EXTREMES]


@pytest.mark.covered("the products above, by the same partition")
def test_float_activations_add_up():
    w = bj.quantize(KERNEL, 4, axis=0)
    found, exchanged = compiled(lambda x, w: bj.matmul(x, w, None, bias=BIAS), X, shard(w, MESH, P("model")))
    np.testing.assert_allclose(found, bj.matmul(X, w, None, bias=BIAS), rtol=1e-5, atol=1e-4)
    assert exchanged == [("all-reduce", "f32[4,12]")]


def test_columns_stay_on_their_device():
    w, a_bits = packed("W4A8g32")
    product = functools.partial(bj.matmul, a_bits=a_bits, bias=BIAS)
    cut = shard(w, MESH, P(None, "model"))
    result = jax.jit(product)(X, cut)
    assert result.sharding.spec == P(None, "model")
    np.testing.assert_array_equal(result, product(X, w))
    assert compiled(product, X, cut)[1] == []


@pytest.mark.covered("the products above, by the same partition")
def test_a_gated_activation_gathers_columns_and_no_weights():
    w, a_bits = packed("W2A2")
    product = functools.partial(bj.matmul, a_bits=a_bits, activation=Activation("silu", gated=True))
    found, exchanged = compiled(product, X, shard(w, MESH, P(None, "model")))
    np.testing.assert_allclose(found, product(X, w), rtol=1e-6)
    assert exchanged == [("all-gather", "f32[4,12]")]


@pytest.mark.covered("the products above, by the same partition")
def test_a_norm_of_whole_rows_before_parts_of_k():
    w, a_bits = packed("W2A2")
    product = functools.partial(bj.matmul, a_bits=a_bits, prologue=RMSNorm(jnp.ones(K), 1e-5))
    found, exchanged = compiled(product, X, shard(w, MESH, P("model")))
    np.testing.assert_array_equal(found, product(X, w))
    assert exchanged == [EXTREMES, SUMS]


@pytest.mark.parametrize(
    ("spec", "x_spec"), [(P("model"), P()), (P(None, "model"), P()), (P(), P("model"))], ids=["k", "n", "m"]
)
@pytest.mark.sample(1)
def test_explicit_meshes(spec, x_spec):
    mesh = jax.make_mesh((2,), ("model",))
    w, a_bits = packed("W4A8")
    with jax.set_mesh(mesh):
        cut, x = shard(w, mesh, spec), jax.device_put(X, x_spec)
        found, exchanged = compiled(lambda x, w: bj.matmul(x, w, a_bits), x, cut)
    np.testing.assert_array_equal(found, bj.matmul(X, w, a_bits))
    assert not any("u32" in shape for _, shape in exchanged)


@pytest.mark.covered("the products above, by the same partition")
def test_vmapped_products_are_left_to_xla():
    w, a_bits = packed("W2A2")
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    with_mesh = shard(stack, MESH, P(None, None, "model"))
    found = jax.jit(jax.vmap(lambda x, w: bj.matmul(x, w, a_bits)))(np.stack([X, X]), with_mesh)
    np.testing.assert_array_equal(found[1], bj.matmul(X, w, a_bits))


@pytest.mark.covered("the products above, by the same partition")
def test_gradients_of_columns():
    w = bj.quantize(KERNEL, 4, axis=0)

    def loss(x, w):
        return jnp.sum(bj.matmul(x, w, 8) ** 2)

    expected = jax.grad(loss)(X, w)
    found = jax.jit(jax.grad(loss))(X, shard(w, MESH, P(None, "model")))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.covered("the products above, by the same partition")
def test_nan_and_large_numbers_reach_their_row_alone():
    w, a_bits = packed("W4A8")
    x = X.copy()
    x[1, 100], x[2, 3] = np.nan, 1e30
    found, _ = compiled(lambda x, w: bj.matmul(x, w, a_bits), x, shard(w, MESH, P("model")))
    assert not np.isfinite(found[1]).any()
    rows = [0, 2, 3]
    np.testing.assert_array_equal(found[rows], bj.matmul(x, w, a_bits)[np.array(rows)])


def in_parts(operation, w, x=X):
    """Traces the operation where k is cut."""
    specs = (P(None, "model"), partition_specs(w, P("model")))
    return jax.eval_shape(jax.shard_map(operation, mesh=MESH, in_specs=specs, out_specs=P()), x, w)


def test_what_parts_of_k_cannot_do_is_refused():
    w, _ = packed("W4A8g32")
    product = functools.partial(bj.matmul, a_bits=8, k_axes="model")
    norm = RMSNorm(jnp.ones(K), 1e-5)
    with pytest.raises(ValueError, match="RMSNorm needs whole rows, and k is cut over model"):
        in_parts(functools.partial(product, prologue=norm), w)
    with pytest.raises(ValueError, match="cut over 2 devices .model., and a token of 64 numbers fits neither k=256"):
        in_parts(product, bj.quantize(normal(256, 4), 4, axis=0))
    with pytest.raises(ValueError, match=r"no axis of tokens that 2 devices divide"):
        in_parts(lambda x, w: product(x[:3], w, token_axes="model"), w)
    with pytest.raises(
        ValueError, match=r"tokens are cut over .'data',., and k over .'model',.: cut both over the same"
    ):
        in_parts(functools.partial(product, token_axes="data"), w)
    with pytest.raises(Unsupported, match="the product of tokens cut over model has no gradient"):
        whole = P(None, None)
        loss = lambda x, w: jnp.sum(bj.matmul(x, w, 8, token_axes="model"))  # noqa: E731
        jax.eval_shape(jax.shard_map(jax.grad(loss), mesh=MESH, in_specs=(whole, P()), out_specs=whole), X, w)
    with pytest.raises(Unsupported, match="has no gradient"):
        in_parts(lambda x, w: jax.grad(lambda x: jnp.sum(product(x, w)))(x), w)
    floats = bj.quantize(KERNEL, 4, axis=0, group_size=32, scales="float")
    with pytest.raises(Unsupported, match="reference gives no sums of groups with float scales"):
        in_parts(functools.partial(product, implementation="reference"), floats)

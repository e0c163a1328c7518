"""`nn.Linear` and `nn.Embed`: initialization, conversion, dtypes, backends, stacks, training."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bipolar_jax import TERNARY, Precision, matmul, quantize, quantize_model
from bipolar_jax.nn import DotGeneral, Embed, Linear, Packed, fuses, joined, without_training
from bipolar_jax.ops import Activation, RMSNorm, dispatch
from tests.support.integer_products import normal

W4A8 = Precision(4, 8, group_size=8)
# XLA may fuse a layer and a plain product differently: a few float32 roundings of numbers of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("precision", [W4A8, Precision(TERNARY), Precision(2, 2, calibration="mse")], ids=str)
def test_linear_from_scratch_is_the_quantized_linear_of_flax(precision, use_bias):
    """Both layers draw the same kernel from the same rngs."""
    ours = Linear(24, 6, precision=precision, use_bias=use_bias, rngs=nnx.Rngs(0))
    theirs = nnx.Linear(24, 6, use_bias=use_bias, rngs=nnx.Rngs(0))
    options = {name: getattr(precision, name) for name in ("group_size", "calibration", "scales")}
    kernel = quantize(theirs.kernel[...], precision.w_bits, -2, **options)
    np.testing.assert_array_equal(ours.kernel.get_value().planes, kernel.planes)
    assert isinstance(ours.kernel, Packed)
    assert (ours.bias is None) == (not use_bias)
    x = normal(2, 3, 24)
    np.testing.assert_allclose(ours(x), matmul(x, kernel, precision.a_bits), **CLOSE)


def test_linear_draws_its_bias():
    layer = Linear(8, 3, precision=W4A8, bias_init=nnx.initializers.constant(2.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(jnp.zeros((1, 8))), [[2.0] * 3])


def test_linear_from_float_quantizes_the_kernel_and_shares_the_bias():
    layer = nnx.Linear(24, 6, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    packed = Linear.from_float(layer, W4A8)
    assert packed.bias is layer.bias
    assert isinstance(layer.kernel, nnx.Param)
    x = normal(5, 24)
    expected = matmul(x, quantize(layer.kernel[...], 4, -2, 8), 8, bias=layer.bias[...])
    np.testing.assert_allclose(packed(x), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_answers_in_the_dtype_of_x(dtype):
    layer = Linear(24, 6, precision=W4A8, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 24), dtype)).dtype == dtype


@nnx.vmap
def three_layers(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(16, 16, rngs=rngs)


def test_a_stack_of_linears_can_be_scanned():
    stack = three_layers(nnx.Rngs(0).split(3))
    packed = Linear.from_float(stack, W4A8)
    assert packed.kernel.get_value().shape == (3, 16, 16)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    x = expected = normal(5, 16)
    for i in range(3):
        expected = matmul(expected, quantize(stack.kernel[i], 4, -2, 8), 8, bias=stack.bias[i])
    # A number near the middle of two 8-bit values may be rounded to either: an error of one step.
    np.testing.assert_allclose(forward(x, packed), expected, atol=0.05)


def test_layers_run_the_given_backend(monkeypatch):
    called = []
    for name, backend in list(dispatch.BACKENDS.items()):
        stub = type(
            name,
            (),
            {
                "weight_only_matmul": staticmethod(
                    lambda *operands, name=name, backend=backend: (
                        called.append(name) or backend.weight_only_matmul(*operands)
                    )
                )
            },
        )
        monkeypatch.setitem(dispatch.BACKENDS, name, stub)
    for name in ("reference", "xla"):
        Linear(8, 3, precision=Precision(4), implementation=name, rngs=nnx.Rngs(0))(jnp.ones((1, 8)))
        Linear.from_float(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), Precision(4), implementation=name)(jnp.ones((1, 8)))
        Embed(5, 8, precision=Precision(4), implementation=name, rngs=nnx.Rngs(0)).attend(jnp.ones((1, 8)))
    assert called == ["reference"] * 3 + ["xla"] * 3


def test_an_unknown_backend_raises():
    layer = Linear(8, 3, precision=W4A8, implementation="cuda", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="got 'cuda'"):
        layer(jnp.ones((1, 8)))


def test_embed_from_scratch_is_the_quantized_embed_of_flax():
    ours = Embed(20, 16, precision=W4A8, rngs=nnx.Rngs(0))
    theirs = nnx.Embed(20, 16, rngs=nnx.Rngs(0))
    table = quantize(theirs.embedding[...], 4, -1, 8)
    ids = jnp.array([[3, 0], [19, 3]])
    np.testing.assert_array_equal(ours(ids), table.dequantize()[ids])


def test_attend_multiplies_with_the_rows_of_lookup():
    packed = Embed.from_float(nnx.Embed(20, 16, rngs=nnx.Rngs(0)), Precision(8, None))
    rows, query = packed(jnp.arange(20)), normal(2, 3, 16)
    logits = packed.attend(query)
    assert logits.shape == (2, 3, 20)
    np.testing.assert_allclose(logits, query @ np.asarray(rows).T, **CLOSE)


def test_embed_quantizes_the_query_of_attend():
    packed = Embed.from_float(nnx.Embed(20, 16, rngs=nnx.Rngs(0)), Precision(8, 2))
    query = normal(3, 16)
    np.testing.assert_allclose(packed.attend(query), matmul(query, packed.embedding.get_value().T, 2), **CLOSE)


@pytest.mark.parametrize("num_embeddings", [20, 1])
def test_embed_takes_the_ids_that_flax_takes(num_embeddings):
    """Negative ids count from the end; others out of range give NaN; a table of one row answers every id."""
    layer = nnx.Embed(num_embeddings, 16, rngs=nnx.Rngs(0))
    packed = Embed.from_float(layer, Precision(8))
    for ids in (jnp.arange(-22, 23), jnp.arange(-22, 23, dtype=jnp.int8), jnp.arange(23, dtype=jnp.uint8)):
        rows = packed(ids)
        np.testing.assert_array_equal(np.isnan(rows), np.isnan(layer(ids)))
        np.testing.assert_allclose(rows, layer(ids), atol=0.02)  # 8-bit rows of numbers of order 1
    with pytest.raises(ValueError, match="ids must be integers"):
        packed(jnp.ones(2))


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "expected"),
    [(None, jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.bfloat16), (None, jnp.bfloat16, jnp.bfloat16)],
)
def test_embed_keeps_the_dtype_of_the_float_layer(dtype, param_dtype, expected):
    layer = nnx.Embed(20, 16, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    packed = Embed.from_float(layer, W4A8)
    assert packed(jnp.arange(3)).dtype == expected == layer(jnp.arange(3)).dtype
    for query in (jnp.ones((2, 16)), jnp.ones((2, 16), jnp.bfloat16)):
        assert packed.attend(query).dtype == expected == layer.attend(query).dtype


DTYPES = (None, jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("general", [False, True], ids=["Linear", "LinearGeneral"])
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.sample(2)
def test_linear_answers_in_the_dtype_of_the_float_layer(general, trained, use_bias):
    """For every dtype, parameter dtype, preferred dtype and dtype of x; values differ by 8-bit roundings."""
    for dtype, param_dtype, preferred in itertools.product(DTYPES, DTYPES[1:], DTYPES):
        layer = (nnx.LinearGeneral if general else nnx.Linear)(
            24,
            6,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            preferred_element_type=preferred,
            bias_init=nnx.initializers.normal(1.0),
            rngs=nnx.Rngs(0),
        )
        if trained:
            layer.dot_general = nnx.static(DotGeneral(8, 8))
        packed = Linear.from_float(layer, Precision(8, 8))
        for x in (normal(2, 24), normal(2, 24).astype(jnp.bfloat16)):
            ours, theirs = packed(jnp.asarray(x)), layer(jnp.asarray(x))
            assert ours.dtype == theirs.dtype, (dtype, param_dtype, preferred, x.dtype)
            np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=0.1)


def test_fused_operations_keep_the_dtype_of_the_layer():
    """A bfloat16 residual stream through a float32 norm and a layer that answers in bfloat16."""
    layer = Linear.from_float(nnx.Linear(24, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), Precision(8, 8))
    x, norm = jnp.asarray(normal(2, 24)), RMSNorm(jnp.ones(24), 1e-6)
    residual = jnp.ones((2, 24), jnp.bfloat16)
    y = layer(x, norm, residual, Activation("relu"))
    assert y.dtype == jnp.bfloat16
    expected = residual + jax.nn.relu(layer(norm(x)))
    np.testing.assert_allclose(np.float32(y), np.float32(expected), atol=0.03)


def test_linear_takes_packed_weights():
    kernel = quantize(normal(3, 24, 6), 4, -2, 8)
    layer = Linear(24, 6, precision="W4A8g8", use_bias=False, kernel=kernel)
    assert layer.kernel.get_value().planes is kernel.planes
    assert layer.precision == W4A8


def test_a_stack_on_another_axis_than_the_first_raises():
    stack = nnx.vmap(lambda rngs: nnx.Linear(16, 8, rngs=rngs), out_axes=1)(nnx.Rngs(0).split(3))
    with pytest.raises(ValueError, match=r"shape \(16, 3, 8\), where one layer has \(16, 8\).*must be the first"):
        Linear.from_float(stack, W4A8)
    table = nnx.vmap(lambda rngs: nnx.Embed(16, 8, rngs=rngs), out_axes=1)(nnx.Rngs(0).split(3))
    with pytest.raises(ValueError, match=r"embedding has shape \(16, 3, 8\)"):
        Embed.from_float(table, W4A8)


def test_a_dot_general_of_another_library_is_not_dropped():
    def other(*arguments, **options):
        return jax.lax.dot_general(*arguments, **options)

    with pytest.raises(ValueError, match=r"its dot_general is other.*set it to jax\.lax\.dot_general"):
        Linear.from_float(nnx.Linear(8, 8, dot_general=other, rngs=nnx.Rngs(0)), W4A8)


def test_from_float_keeps_the_dot_general_of_training():
    layer = nnx.Linear(24, 6, dot_general=DotGeneral(2, 4, implementation="xla"), rngs=nnx.Rngs(0))
    packed = Linear.from_float(layer)
    assert (packed.precision, packed.implementation, packed.trained) == (Precision(2, 4), "xla", layer.dot_general)
    with pytest.raises(ValueError, match="trained at W2A4"):
        Linear.from_float(layer, W4A8)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_trained_layers_join_and_then_fuse_unless_they_clip(clip):
    options = {"dot_general": DotGeneral(4, 8, clip_activations=clip), "dtype": jnp.float32}
    layers = [Linear.from_float(nnx.Linear(24, n, rngs=nnx.Rngs(n), **options)) for n in (6, 8)]
    whole = joined(layers)
    assert whole.out_features == 14
    assert fuses(whole) == (clip is None)
    assert not fuses(layers[0])
    assert fuses(without_training(nnx.List(layers))[0]) == (clip is None)
    x, norm = jnp.asarray(normal(2, 24)), RMSNorm(jnp.ones(24), 1e-6)
    for prologue in (None, norm):
        np.testing.assert_allclose(
            whole(x, prologue), jnp.concatenate([layer(x, prologue) for layer in layers], axis=-1), **CLOSE
        )


def test_layers_over_several_axes_do_not_join():
    layers = [Linear.from_float(nnx.LinearGeneral((4, 6), 6, axis=(-2, -1), rngs=nnx.Rngs(0)), W4A8)] * 2
    with pytest.raises(ValueError, match="contract other axes than the last"):
        joined(layers)


def test_layers_take_an_out_sharding_on_explicit_meshes():
    spec = jax.sharding.PartitionSpec("data", None)
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        linear=nnx.Linear(8, 4, rngs=rngs),
        trained=nnx.Linear(8, 4, dot_general=DotGeneral(8, 8), rngs=rngs),
        einsum=nnx.Einsum("bd,dh->bh", (8, 4), (4,), rngs=rngs),
        embed=nnx.Embed(10, 8, rngs=rngs),
    )
    packed = quantize_model(model, [(".*", "W8A8")])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 8)), jax.NamedSharding(mesh, spec))
        ids = jax.device_put(jnp.arange(4), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        for name in packed:
            y = packed[name](ids if name == "embed" else x, out_sharding=spec)
            assert jax.typeof(y).sharding.spec == spec, name
        assert jax.typeof(packed["embed"].attend(x, out_sharding=spec)).sharding.spec == spec
        # Nothing that enters this program lies on the mesh.
        y = jax.jit(lambda x: packed["linear"](x, out_sharding=spec))(np.ones((4, 8), np.float32))
        assert y.sharding.spec == spec
        np.testing.assert_array_equal(y, packed["linear"](x))


def test_repr_counts_parameters():
    layer = Linear(64, 32, precision=W4A8, rngs=nnx.Rngs(0))
    assert repr(layer).startswith("Linear( # Param: 32 (128 B), Packed: 2,048 (1.8 KB), Total: 2,080 (1.9 KB)\n")
    assert "kernel=Packed( # Packed: 2,048 (1.8 KB)" in repr(nnx.List([layer]))


def test_training_changes_parameters_but_not_packed_weights():
    layer = Linear(8, 3, precision=W4A8, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, layer.kernel.get_value())
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x):
        gradient = nnx.grad(lambda layer: layer(x).sum())(layer)
        optimizer.update(layer, gradient)
        return gradient

    gradient = step(layer, optimizer, jnp.ones((2, 8)))
    assert len(jax.tree.leaves(gradient)) == 1  # the bias
    np.testing.assert_allclose(layer.bias[...], [-1.0] * 3)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(layer.kernel.get_value()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_split_and_merge_keep_a_layer():
    layer = Linear(8, 3, precision=W4A8, rngs=nnx.Rngs(0))
    graph, parameters, packed = nnx.split(layer, nnx.Param, Packed)
    assert (len(jax.tree.leaves(parameters)), len(jax.tree.leaves(packed))) == (1, 5)
    x = normal(2, 8)
    np.testing.assert_array_equal(nnx.merge(graph, parameters, packed)(x), layer(x))
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), layer(x), **CLOSE)


def test_a_group_size_above_the_contracted_size_raises():
    with pytest.raises(ValueError, match="contracted size 8, got 16"):
        Linear(8, 3, precision=Precision(4, 8, 16), rngs=nnx.Rngs(0))

"""Packed models in `jax.export`, `flax.serialization` and Orbax."""

from __future__ import annotations

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import bipolar_jax as bj
from tests.support.integer_products import normal

ARRAYS = {
    "W4": lambda: bj.quantize(normal(8, 3), 4, -2, calibration="absmax"),
    "W1.58g4": lambda: bj.quantize(normal(8, 3), bj.TERNARY, -2, 4, scales="integer"),
    "W1.58g4f": lambda: bj.quantize(normal(8, 3), bj.TERNARY, -2, 4, scales="float"),
    "W3 minmax": lambda: bj.quantize(normal(3, 8), 3, -1, calibration="minmax"),
}


def assert_identical(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def model() -> nnx.List:
    layers = [nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)]
    return bj.quantize_model(nnx.List([*layers, nnx.LayerNorm(8, rngs=nnx.Rngs(0))]), [(".*", "W4A8")])


@pytest.mark.parametrize("name", ARRAYS)
def test_exported_functions_take_and_return_packed_arrays(name):
    w = ARRAYS[name]()
    x = jnp.asarray(normal(2, 8))

    def product(x, w):
        return bj.matmul(x, w if w.axis == -2 else w.T, 8), w

    exported = jax.export.deserialize(jax.export.export(jax.jit(product))(x, w).serialize())
    y, again = exported.call(x, w)
    np.testing.assert_array_equal(y, jax.jit(product)(x, w)[0])
    assert_identical(again, w)


def test_functions_of_any_number_of_tokens_are_exported():
    packed = model()
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8"), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: packed[0](x)))(shape)
    x = jnp.asarray(normal(3, 8))
    np.testing.assert_allclose(exported.call(x), packed[0](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARRAYS)
def test_flax_serialization_restores_packed_arrays(name):
    w = ARRAYS[name]()
    data = flax.serialization.to_bytes({"kernel": w})
    abstract = jax.eval_shape(lambda: {"kernel": w})
    for target in ({"kernel": w}, abstract):
        assert_identical(flax.serialization.from_bytes(target, data), {"kernel": w})
    assert flax.serialization.msgpack_restore(data)["kernel"]["bits"] == w.bits


@pytest.mark.parametrize(
    ("make_target", "message"),
    [
        (lambda: bj.quantize(normal(8, 3), 3, -2), "'bits': 4.* but its target .*'bits': 3"),
        (lambda: bj.quantize(normal(8, 5), 4, -2), r"uint32\[4, 3, 1\].* but its target .*uint32\[4, 5, 1\]"),
        (lambda: bj.quantize(normal(8, 3), 4, -2, calibration="minmax"), "has the leaves .*, but its target .*offset"),
    ],
)
def test_a_target_of_another_structure_is_refused(make_target, message):
    data = flax.serialization.to_bytes(ARRAYS["W4"]())
    with pytest.raises(ValueError, match=message):
        flax.serialization.from_bytes(make_target(), data)


@pytest.mark.parametrize("with_target", [False, True])
def test_orbax_restores_pure_dicts(with_target, tmp_path):
    original = model()
    pure = nnx.to_pure_dict(nnx.state(original))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pure", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "pure", *([pure] if with_target else []))
    graph, state = nnx.split(nnx.eval_shape(model))
    nnx.replace_by_pure_dict(state, restored)
    assert_identical(nnx.to_pure_dict(state), pure)
    x = jnp.asarray(normal(2, 8))
    np.testing.assert_array_equal(nnx.merge(graph, state)[0](x), original[0](x))


def test_packed_files_of_pure_dicts_update_lists_of_layers(tmp_path):
    """With Flax's own recipe for keys that a file keeps as texts."""
    original, other = model(), nnx.eval_shape(model)
    bj.save(tmp_path / "pure.safetensors", nnx.to_pure_dict(nnx.state(original)))
    nnx.update(other, nnx.restore_int_paths(bj.load(tmp_path / "pure.safetensors")))
    assert_identical(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(original)))


def test_a_list_of_other_leaves_is_refused():
    kernel = model()[0].kernel
    planes, *others = jax.tree.leaves(kernel.get_value())
    with pytest.raises(ValueError, match=r"the leaves .*uint32\[4, 4, 1\].*uint32\[4, 8, 1\]"):
        kernel.replace([planes[:, :4], *others, None])
    with pytest.raises(ValueError, match="the leaves planes, scale, offset, row_sums, groups, got a list of 1"):
        kernel.replace([planes])

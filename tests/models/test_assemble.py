"""`assemble`: every parameter exactly once, of the right shape, finite."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.models.assemble import assemble, check_layout
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=11, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, ffn_size=5, context_length=16
)
KERNEL = "layers/attention/q_proj/kernel"


def tensors_of(model: Transformer) -> list[tuple[str, int | None, np.ndarray]]:
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(variable[...])
        if path[0] == "layers":
            found += [("/".join(path), layer, array[layer]) for layer in range(len(array))]
        else:
            found.append(("/".join(path), None, array))
    return found


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def tensors(model) -> list[tuple[str, int | None, np.ndarray]]:
    return tensors_of(model)


def position(tensors, path, layer=None) -> int:
    return next(i for i, (p, n, _) in enumerate(tensors) if (p, n) == (path, layer))


def test_restores_a_model_from_its_tensors_in_any_order(model, tensors):
    order = np.random.default_rng(0).permutation(len(tensors))
    rebuilt = assemble(CONFIG, (tensors[i] for i in order))
    ids = jnp.array([[1, 2, 3, 4]])
    np.testing.assert_array_equal(rebuilt(ids), model(ids))
    for (path, layer, array), (_, _, again) in zip(tensors, tensors_of(rebuilt), strict=True):
        np.testing.assert_array_equal(array, again, err_msg=f"{path} {layer}")


def test_parameters_have_the_asked_dtype(tensors):
    rebuilt = assemble(CONFIG, tensors, jnp.bfloat16)
    assert {leaf.dtype for leaf in map(jnp.asarray, nnx.to_pure_dict(nnx.state(rebuilt))["embed"].values())} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert rebuilt.hidden_states(jnp.array([[1, 2]])).dtype == jnp.bfloat16


def test_reads_tensors_one_by_one(tensors):
    """A tensor is taken over before the next is asked for: the caller may reuse its memory."""
    scratch = {}

    def stream():
        for path, layer, array in tensors:
            buffer = scratch.setdefault(array.shape, np.empty_like(array))
            buffer[...] = array
            yield path, layer, buffer

    for (path, layer, array), (_, _, again) in zip(tensors, tensors_of(assemble(CONFIG, stream())), strict=True):
        np.testing.assert_array_equal(array, again, err_msg=f"{path} {layer}")


def test_names_what_is_missing(tensors):
    del tensors[position(tensors, KERNEL, 1)]
    with pytest.raises(ValueError, match="missing tensors layers/1/attention/q_proj/kernel:"):
        assemble(CONFIG, tensors)
    with pytest.raises(ValueError, match=r"missing tensors embed/embedding, .* and 24 more"):
        assemble(CONFIG, [])


def test_refuses_an_unexpected_tensor(tensors):
    with pytest.raises(ValueError, match="unexpected tensor layers/0/attention/o_proj/bias: the model has only embed/"):
        assemble(CONFIG, [*tensors, ("layers/attention/o_proj/bias", 0, np.zeros(8))])
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ValueError, match="unexpected tensor lm_head/kernel"):
        assemble(tied, tensors)


def test_refuses_a_tensor_that_comes_twice(tensors):
    with pytest.raises(ValueError, match="layers/2/attention/q_proj/kernel occurs twice"):
        assemble(CONFIG, [*tensors, tensors[position(tensors, KERNEL, 2)]])


def test_refuses_a_wrong_shape_with_both_shapes(tensors):
    index = position(tensors, "layers/ffn/up_proj/kernel", 0)
    path, layer, array = tensors[index]
    tensors[index] = (path, layer, array.T)
    with pytest.raises(ValueError, match=r"layers/0/ffn/up_proj/kernel has shape \(5, 8\), .* asks for \(8, 5\)"):
        assemble(CONFIG, tensors)


@pytest.mark.parametrize("layer", [-1, 3])
def test_refuses_a_layer_out_of_range(layer):
    with pytest.raises(ValueError, match=f"of layer {layer}, but the config has num_layers=3"):
        assemble(CONFIG, [(KERNEL, layer, np.zeros((8, 8)))])


@pytest.mark.parametrize(("path", "layer"), [(KERNEL, None), ("final_norm/scale", 0)])
def test_refuses_a_layer_where_none_belongs_and_the_reverse(path, layer):
    with pytest.raises(ValueError, match=f"{path} has layer={layer}"):
        assemble(CONFIG, [(path, layer, np.zeros(8))])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_values_that_are_not_finite(tensors, value):
    index = position(tensors, KERNEL, 2)
    path, layer, array = tensors[index]
    array = array.copy()
    array[:2, 0] = value
    tensors[index] = (path, layer, array)
    with pytest.raises(ValueError, match="layers/2/attention/q_proj/kernel has 2 values of 64 that are not finite"):
        assemble(CONFIG, tensors)


def test_refuses_values_that_overflow_the_dtype(tensors):
    tensors = [(path, layer, np.full_like(array, 1e6)) for path, layer, array in tensors]
    with pytest.raises(ValueError, match="not finite in float16: .* wider param_dtype"):
        assemble(CONFIG, tensors, jnp.float16)


@pytest.mark.parametrize("size", ["num_layers", "vocab_size", "hidden_size", "ffn_size", "head_dim"])
def test_absurd_sizes_are_refused_without_allocating(tensors, size):
    absurd = dataclasses.replace(CONFIG, **{size: 2**40})
    with pytest.raises(ValueError, match="missing tensors|has shape"):
        check_layout(absurd, ((path, layer, array.shape) for path, layer, array in tensors))


def test_layout_needs_every_tensor(tensors):
    layout = [(path, layer, array.shape) for path, layer, array in tensors]
    check_layout(CONFIG, layout)
    for index in range(len(layout)):
        with pytest.raises(ValueError, match="missing tensors"):
            check_layout(CONFIG, itertools.chain(layout[:index], layout[index + 1 :]))

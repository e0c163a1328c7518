"""A packed model as one that learns, and back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.distillation.learning_layers import (
    FrozenEmbed,
    Latent,
    LearningLinear,
    MatrixRotation,
    Step,
)
from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.nn.compressible import Compressible, Layered, layer_at
from bipolar_jax.nn.convert.summary import packed_layers
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.layers.packed import Packed

# Numbers that learn, by path.
Learned = dict[str, Float[Array, "..."]]
# Layers whose weights learn; an output layer of 8 bits has nothing to win, and as many weights as all others.
LEARNING = "^layers/"
# Parameters of norms, and biases of float layers, learn too.
_VECTORS = ("scale", "bias")


def learning_model[Model: nnx.Module](
    packed: Model,
    floats: nnx.Module | None = None,
    *,
    learning: str = LEARNING,
    learn_groups: bool = False,
    dtype: Any = jnp.float32,
) -> Model:
    """A copy of a packed model that computes the same with float products, and can be differentiated.

    In layers that learn, latent weights, scales and offsets do; norms and biases do everywhere; embeddings, output
    layers and float weights do not.

    Args:
      packed: a model with packed layers, before `prepare_for_inference`; it is not changed.
      floats: the model that it was made from, in the same basis: rotated as it is. Its weights say where latent weights
        start within their cells; None starts them in the middle.
      learning: regular expression of the paths of layers that learn; the output layer does not (`window_loss`).
      learn_groups: whether the integers of integer groups learn, too; else only the scale of each row does.
      dtype: of the products' operands: bfloat16 is fast on GPUs. With 16 bits so is what a block hands from layer to
        layer, attention included, and blocks rotate by products with matrices. Sums, norms and the residual stream keep
        the model's.

    Raises:
      ValueError: no packed layers that learn, or the output layer is to; packed layers of another kind than `nn.Linear`
        and `nn.Embed`, or trained ones; floats without a layer of the same shape.
    """
    if isinstance(packed, Layered) and isinstance(floats, Layered):
        floats = floats.with_runs(packed.runs)
    model, count = nnx.clone(packed), 0
    for path, layer in packed_layers(packed):
        if isinstance(layer, Embed):
            stand_in: nnx.Module = FrozenEmbed(layer, dtype=dtype)
        elif isinstance(layer, Linear):
            learns = re.search(learning, path) is not None
            if learns and layer is getattr(packed, "output_layer", None):
                raise ValueError(f"{learning!r} matches the output layer {path}, which does not learn: leave it out")
            kernel = layer_at(floats, path).kernel[...] if learns and floats is not None else None
            stand_in = LearningLinear(
                layer,
                kernel,
                learns=learns,
                learn_groups=learn_groups,
                dtype=dtype,
                result_dtype=_result_dtype(packed, path, layer, jnp.dtype(dtype)),
            )
            count += learns
        else:
            raise ValueError(f"{path} is a {type(layer).__name__}, which is not distilled: leave it float")
        _replace(model, path, stand_in)
    if not count:
        raise ValueError(f"no packed layer has a path that matches {learning!r}: there is nothing to learn")
    if jnp.dtype(dtype).itemsize == 2:
        for _, module in list(nnx.iter_modules(model)):
            for name, value in list(vars(module).items()):
                if isinstance(value, Hadamard):
                    setattr(module, name, MatrixRotation(value, jnp.dtype(dtype)))
    return model


def _result_dtype(packed: nnx.Module, path: str, layer: Linear, dtype: jnp.dtype) -> Any:
    """Of a layer's output where operands have 16 bits: those, but the model's where it adds to the residual stream."""
    if dtype.itemsize != 2 or not isinstance(packed, Compressible):
        return None
    sites = next((sites for sites in packed.block_sites for name in sites.names if path.endswith(f"/{name}")), None)
    if sites is None or sites.to_stream:
        return layer.dtype or layer.param_dtype or jnp.float32
    return dtype


@dataclasses.dataclass(frozen=True)
class StudentLayout:
    """What a learning model is but its numbers; equal ones share compiled programs.

    Attributes:
      graph: of the model.
      learned: path and kind of each variable that learns.
    """

    graph: nnx.GraphDef
    learned: tuple[tuple[tuple, type[nnx.Variable]], ...]

    def model(self, params: Learned, rest: nnx.State) -> Any:
        """The model with these numbers."""
        learned = nnx.from_flat_state((path, kind(params[_name(path)])) for path, kind in self.learned)
        return nnx.merge(self.graph, learned, rest)


class Student:
    """A learning model apart: what learns by path, which steps update, and the rest, which they only read.

    Attributes:
      params: the numbers at the beginning.
      rest: what does not learn; an operand of compiled programs.
      layout: how to put both together.
    """

    def __init__(self, model: nnx.Module):
        graph, learned, self.rest = nnx.split(model, _learns, ...)
        learned = nnx.to_flat_state(learned)
        self.params: Learned = {_name(path): variable.get_value() for path, variable in learned}
        self.layout = StudentLayout(graph, tuple((path, type(variable)) for path, variable in learned))

    def model(self, params: Learned) -> Any:
        """The model with these numbers."""
        return self.layout.model(params, self.rest)


def is_latent(name: str) -> bool:
    """Whether a number that learns, by its path, is a latent weight: others learn more slowly."""
    return name.rpartition("/")[2] == "rows"


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _learns(path: tuple, variable: nnx.Variable) -> bool:
    """Whether training moves a variable."""
    return isinstance(variable, Latent | Step) or (type(variable) is nnx.Param and path[-1] in _VECTORS)


def packed_again[Model: nnx.Module](learned: nnx.Module, packed: Model) -> Model:
    """A copy of the packed model with what a learning one has learned.

    Args:
      learned: made of it by `learning_model`.
      packed: the packed model.
    """
    result, numbers = nnx.clone(packed), dict(nnx.to_flat_state(nnx.state(learned)))
    for path, layer in packed_layers(packed):
        source = layer_at(learned, path)
        if isinstance(layer, Linear) and isinstance(source.rows, Latent):
            target = layer_at(result, path)
            target.kernel = Packed(source.latent().packed())
    state = nnx.to_flat_state(nnx.state(result))
    kept = [(path, each.replace(numbers[path].get_value()) if _is_vector(path, each) else each) for path, each in state]
    nnx.update(result, nnx.from_flat_state(kept))
    return result


def _is_vector(path: tuple, variable: nnx.Variable) -> bool:
    return isinstance(variable, nnx.Param) and path[-1] in _VECTORS


def _replace(model: nnx.Module, path: str, layer: nnx.Module) -> None:
    *parents, name = path.split("/")
    setattr(layer_at(model, "/".join(parents)) if parents else model, name, layer)

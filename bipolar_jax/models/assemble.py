"""From a stream of named tensors to a `Transformer`, checked, and without a second copy of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer

# What is known of a tensor before it is read: module path joined by "/", layer or None, shape in our orientation.
Entry = tuple[str, int | None, tuple[int, ...]]
# How many tensors an error message names; a wrong model can miss hundreds.
_NAMED_AT_MOST = 6


def check_layout(config: TransformerConfig, layout: Iterable[Entry]) -> None:
    """Checks the names and shapes of a file's tensors before any of them is read or allocated.

    Args:
      config: what the file says about itself.
      layout: (path, layer, shape) of every tensor, as `assemble` will get them.

    Raises:
      ValueError: a tensor is missing, unexpected, there twice, of another shape, or of a layer out of range.
    """
    arrivals = _Arrivals(config)
    for path, layer, shape in layout:
        arrivals.admit(path, layer, shape)
    arrivals.finish()


def assemble(
    config: TransformerConfig, tensors: Iterable[tuple[str, int | None, np.ndarray]], param_dtype: Any = jnp.float32
) -> Transformer:
    """Builds a model from tensors that arrive one by one, in any order.

    Each parameter has one host buffer in `param_dtype`, made when its first tensor
    arrives and handed to JAX when its last one has. Tensors sorted by path
    therefore never hold more than one parameter twice.

    Args:
      config: fixes which tensors must arrive, and their shapes.
      tensors: (path, layer, array): path of the parameter in the model joined by
        "/" (for example "layers/attention/q_proj/kernel"), the layer for those
        under "layers/" and None for the others, and a float array in the
        parameter's orientation (kernels are [in, out]), without the layer axis.
      param_dtype: dtype of the parameters and of the computation.

    Raises:
      ValueError: a tensor is missing, unexpected, there twice, of another shape,
        of a layer out of range, or holds values that are not finite in `param_dtype`.
    """
    arrivals = _Arrivals(config, param_dtype)
    buffers: dict[str, np.ndarray] = {}
    arrays: dict[str, Any] = {}
    for path, layer, array in tensors:
        arrivals.admit(path, layer, array.shape)
        if path not in buffers:
            # Only now that a tensor of the right shape exists: a wrong config costs no memory.
            buffers[path] = np.empty(arrivals.stacked_shape(path), param_dtype)
        target = buffers[path] if layer is None else buffers[path][layer]
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            target[...] = array
        bad = target.size - int(np.count_nonzero(np.isfinite(target)))
        if bad:
            raise ValueError(
                f"tensor {_name(path, layer)} has {bad} values of {target.size} that are not finite in "
                f"{np.dtype(param_dtype).name}: the file is damaged, or needs a wider param_dtype"
            )
        if arrivals.is_full(path):
            # May share the buffer's memory, as jnp.asarray would not: nobody else holds it.
            arrays[path] = jax.device_put(buffers.pop(path))
    arrivals.finish()
    graph, state = nnx.split(arrivals.abstract)
    filled = [(path, variable.replace(arrays["/".join(path)])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


class _Arrivals:
    """Which tensors a model needs, and which have come."""

    def __init__(self, config: TransformerConfig, param_dtype: Any = jnp.float32):
        self.abstract = nnx.eval_shape(lambda: Transformer(config, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
        self._num_layers = config.num_layers
        self._shapes = {
            "/".join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.split(self.abstract)[1])
        }
        self._seen: dict[str, set[int | None]] = {path: set() for path in self._shapes}

    def stacked_shape(self, path: str) -> tuple[int, ...]:
        """Shape of the whole parameter, layer axis included."""
        return self._shapes[path]

    def is_full(self, path: str) -> bool:
        return len(self._seen[path]) == (self._num_layers if _is_stacked(path) else 1)

    def admit(self, path: str, layer: int | None, shape: tuple[int, ...]) -> None:
        """Counts one tensor. Raises ValueError where it does not belong."""
        name = _name(path, layer)
        if path not in self._shapes:
            raise ValueError(f"unexpected tensor {name}: the model has only {', '.join(sorted(self._shapes))}")
        if _is_stacked(path) != (layer is not None):
            raise ValueError(f"tensor {path} came with {layer=}: those under 'layers/' need a layer, others none")
        if layer is not None and not 0 <= layer < self._num_layers:
            raise ValueError(f"tensor {name} is of layer {layer}, but the config has num_layers={self._num_layers}")
        expected = self._shapes[path][1:] if _is_stacked(path) else self._shapes[path]
        if tuple(shape) != tuple(expected):
            raise ValueError(
                f"tensor {name} has shape {tuple(shape)}, but the config asks for {tuple(expected)}: "
                "the file's config and its weights disagree"
            )
        if layer in self._seen[path]:
            raise ValueError(f"tensor {name} came twice: every parameter must come exactly once")
        self._seen[path].add(layer)

    def finish(self) -> None:
        """Raises ValueError unless every tensor has come."""
        # Lazy, and cut short: a damaged config can ask for billions of layers.
        missing = (
            _name(path, layer)
            for path in self._shapes
            if not self.is_full(path)
            for layer in (range(self._num_layers) if _is_stacked(path) else (None,))
            if layer not in self._seen[path]
        )
        named = list(itertools.islice(missing, _NAMED_AT_MOST))
        if named:
            count = sum((self._num_layers if _is_stacked(path) else 1) - len(seen) for path, seen in self._seen.items())
            more = f" and {count - len(named)} more" if count > len(named) else ""
            raise ValueError(
                f"missing tensors {', '.join(named)}{more}: the file is incomplete, or its config is wrong"
            )


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _name(path: str, layer: int | None) -> str:
    """The tensor's name in messages: "layers/7/attention/q_proj/kernel"."""
    return path if layer is None else path.replace("layers/", f"layers/{layer}/", 1)

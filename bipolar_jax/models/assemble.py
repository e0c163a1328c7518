"""Builds a `Transformer` from a stream of named tensors, with checks and without a second copy of the weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.packing.host_memory import aligned_empty

# Description of a tensor: parameter path joined by "/", layer or None, shape in our orientation.
Entry = tuple[str, int | None, tuple[int, ...]]
# Most missing tensors that an error message names.
_MOST_NAMED = 6
_CHUNK_ELEMENTS = 1 << 20
_PARAM_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read straight into the parameter's buffer, so that it is in memory once.

    Attributes:
      shape: shape in the parameter's orientation.
      copy_to: fills an array of this shape with the tensor's values.
    """

    shape: tuple[int, ...]
    copy_to: Callable[[np.ndarray], None]


def check_param_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of parameters, from a dtype or its name. Raises ValueError if models do not compute in it."""
    try:
        name = jnp.dtype(dtype).name
    except (TypeError, ValueError):
        name = dtype
    if name not in _PARAM_DTYPES:
        raise ValueError(f"param_dtype is {name!r:.60}, expected {', '.join(_PARAM_DTYPES)}")
    return jnp.dtype(name)


def check_layout(config: TransformerConfig, layout: Iterable[Entry]) -> None:
    """Checks the names and shapes of all tensors before any of them is read or allocated.

    Args:
      config: the model's config.
      layout: (path, layer, shape) of every tensor, as for `assemble`.

    Raises:
      ValueError: a tensor is missing, unexpected or duplicate, or has the wrong shape or a layer out of range.
    """
    checklist = _Checklist(config)
    for path, layer, shape in layout:
        checklist.add(path, layer, shape)
    checklist.check_complete()


def assemble(
    config: TransformerConfig,
    tensors: Iterable[tuple[str, int | None, np.ndarray | LazyTensor]],
    param_dtype: Any = jnp.float32,
) -> Transformer:
    """Builds a model from tensors in any order.

    Each parameter has one host buffer in `param_dtype`, allocated with its first tensor and
    handed to JAX after its last, which takes it over on CPUs. If tensors are sorted by path, at
    most one parameter is in memory twice elsewhere.

    Args:
      config: the model's config, which determines the required tensors and their shapes.
      tensors: (path, layer, array). The path of the parameter is joined by "/", such as
        "layers/attention/q_proj/kernel"; the layer is None outside "layers/"; the float array,
        or `LazyTensor`, has the parameter's orientation (kernels are [in, out]) without the
        layer axis.
      param_dtype: dtype of the parameters and of the computation.

    Raises:
      ValueError: a tensor is missing, unexpected or duplicate, has the wrong shape or a layer
        out of range, or holds values that are not finite in `param_dtype`.
    """
    checklist = _Checklist(config, param_dtype)
    buffers: dict[str, np.ndarray] = {}
    arrays: dict[str, Any] = {}
    for path, layer, array in tensors:
        checklist.add(path, layer, array.shape)
        if path not in buffers:
            # Allocated after the check, so that a wrong config allocates no memory.
            buffers[path] = aligned_empty(checklist.stacked_shape(path), param_dtype)
        target = buffers[path] if layer is None else buffers[path][layer]
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            if isinstance(array, LazyTensor):
                array.copy_to(target)
            else:
                target[...] = array
        bad = count_not_finite(target)
        if bad:
            raise ValueError(
                f"tensor {_name(path, layer)} has {bad} values of {target.size} that are not finite in "
                f"{np.dtype(param_dtype).name}: the file is damaged, or needs a wider param_dtype"
            )
        if checklist.is_complete(path):
            # device_put takes the buffer over, unlike jnp.asarray; there is no other reference to it.
            arrays[path] = jax.device_put(buffers.pop(path))
    checklist.check_complete()
    graph, state = nnx.split(checklist.abstract)
    filled = [(path, variable.replace(arrays["/".join(path)])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def count_not_finite(array: np.ndarray) -> int:
    """Number of NaN and Inf, counted in chunks, because each element takes a byte of a mask."""
    flat = array.reshape(-1)
    chunks = (flat[start : start + _CHUNK_ELEMENTS] for start in range(0, flat.size, _CHUNK_ELEMENTS))
    return sum(chunk.size - int(np.count_nonzero(np.isfinite(chunk))) for chunk in chunks)


@functools.lru_cache(maxsize=4)  # loading needs it twice, and tracing takes a tenth of a second
def abstract_model(config: TransformerConfig, param_dtype: str) -> Transformer:
    """Shapes and dtypes of a model. Raises ValueError if the config has sizes that JAX cannot count."""
    try:
        return nnx.eval_shape(lambda: Transformer(config, param_dtype=jnp.dtype(param_dtype), rngs=nnx.Rngs(0)))
    except (TypeError, OverflowError) as error:  # JAX counts elements in 64 bits
        raise ValueError(f"the config has impossible sizes: {error!s:.200}") from error


class _Checklist:
    """The tensors that a model requires, and which of them have been added."""

    def __init__(self, config: TransformerConfig, param_dtype: Any = jnp.float32):
        self.abstract = abstract_model(config, np.dtype(param_dtype).name)
        self._num_layers = config.num_layers
        self._shapes = {
            "/".join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.split(self.abstract)[1])
        }
        self._seen: dict[str, set[int | None]] = {path: set() for path in self._shapes}

    def stacked_shape(self, path: str) -> tuple[int, ...]:
        """Shape of the whole parameter, layer axis included."""
        return self._shapes[path]

    def is_complete(self, path: str) -> bool:
        """Whether all tensors of a parameter have been added."""
        return len(self._seen[path]) == (self._num_layers if _is_stacked(path) else 1)

    def add(self, path: str, layer: int | None, shape: tuple[int, ...]) -> None:
        """Adds one tensor. Raises ValueError if the model does not require it."""
        name = _name(path, layer)
        if path not in self._shapes:
            raise ValueError(f"unexpected tensor {name:.200}: the model has only {', '.join(sorted(self._shapes))}")
        if _is_stacked(path) != (layer is not None):
            raise ValueError(f"tensor {path} has {layer=}: tensors under 'layers/' need a layer, others must have None")
        if layer is not None and not 0 <= layer < self._num_layers:
            raise ValueError(f"tensor {name} is of layer {layer}, but the config has num_layers={self._num_layers}")
        expected = self._shapes[path][1:] if _is_stacked(path) else self._shapes[path]
        if tuple(shape) != tuple(expected):
            raise ValueError(
                f"tensor {name} has shape {tuple(shape)}, but the config asks for {tuple(expected)}: "
                "the file's config and its weights disagree"
            )
        if layer in self._seen[path]:
            raise ValueError(f"tensor {name} occurs twice: every parameter must occur once")
        self._seen[path].add(layer)

    def check_complete(self) -> None:
        """Raises ValueError if a tensor is missing."""
        # Lazy, because a damaged config can ask for billions of layers.
        missing = (
            _name(path, layer)
            for path in self._shapes
            if not self.is_complete(path)
            for layer in (range(self._num_layers) if _is_stacked(path) else (None,))
            if layer not in self._seen[path]
        )
        named = list(itertools.islice(missing, _MOST_NAMED))
        if named:
            count = sum((self._num_layers if _is_stacked(path) else 1) - len(seen) for path, seen in self._seen.items())
            more = f" and {count - len(named)} more" if count > len(named) else ""
            raise ValueError(
                f"missing tensors {', '.join(named)}{more}: the file is incomplete, or its config is wrong"
            )


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _name(path: str, layer: int | None) -> str:
    """Name for messages, such as "layers/7/attention/q_proj/kernel"."""
    return path if layer is None else path.replace("layers/", f"layers/{layer}/", 1)

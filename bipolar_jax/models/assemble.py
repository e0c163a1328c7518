"""Builds a `Transformer` from a stream of named tensors, with checks and without a second copy of the weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.packed_kernels import (
    PackedBuffer,
    PackedKind,
    PackedTensor,
    runs_of_kinds,
    stacked_path,
    with_packed_kernels,
)
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
    tensors: Iterable[tuple[str, int | None, np.ndarray | LazyTensor | PackedTensor]],
    param_dtype: Any = jnp.float32,
    kinds: Mapping[tuple[str, int | None], PackedKind] = types.MappingProxyType({}),
) -> Transformer:
    """Builds a model from tensors in any order.

    Each parameter has one host buffer in `param_dtype`, or of packed numbers, allocated with its
    first tensor and handed to JAX after its last, which takes it over on CPUs. If tensors are
    sorted by path, at most one parameter is in memory twice elsewhere. Layers whose kernels are
    packed differently become several stacks.

    Args:
      config: the model's config, which determines the required tensors and their shapes.
      tensors: (path, layer, array). The path of the parameter is joined by "/", such as
        "layers/attention/q_proj/kernel"; the layer is None outside "layers/"; the float array,
        `LazyTensor` or `PackedTensor`, has the parameter's orientation (kernels are [in, out])
        without the layer axis.
      param_dtype: dtype of the float parameters and of the computation.
      kinds: of all packed tensors, by path and layer.

    Raises:
      ValueError: a tensor is missing, unexpected or duplicate, has the wrong shape or a layer
        out of range, or holds values that are not finite in `param_dtype`.
    """
    checklist = _Checklist(config, param_dtype, kinds)
    buffers: dict[str, np.ndarray | PackedBuffer] = {}
    arrays: dict[str, Any] = {}
    for path, layer, array in tensors:
        checklist.add(path, layer, array.shape)
        stacked, index, stack = checklist.place(path, layer)
        is_packed = isinstance(array, PackedTensor)
        if stacked not in buffers:
            # Allocated after the check, so that a wrong config allocates no memory.
            if is_packed:
                buffers[stacked] = PackedBuffer(stack, array)
            else:
                buffers[stacked] = aligned_empty((*stack, *array.shape), param_dtype)
        if is_packed:
            try:
                buffers[stacked].fill(index, array.read())
            except ValueError as error:
                raise ValueError(f"tensor {_name(path, layer)}: {error}") from error
            if checklist.is_complete(path, layer):
                arrays[stacked], order = buffers.pop(stacked).finish()
                arrays[f"{stacked.removesuffix('kernel')}order"] = order
            continue
        target = buffers[stacked][index]
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
        if checklist.is_complete(path, layer):
            # device_put takes the buffer over, unlike jnp.asarray; there is no other reference to it.
            arrays[stacked] = jax.device_put(buffers.pop(stacked))
    checklist.check_complete()
    abstract = with_packed_kernels(checklist.abstract, checklist.runs, kinds) if kinds else checklist.abstract
    graph, state = nnx.split(abstract)
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

    def __init__(
        self,
        config: TransformerConfig,
        param_dtype: Any = jnp.float32,
        kinds: Mapping[tuple[str, int | None], PackedKind] = types.MappingProxyType({}),
    ):
        self.abstract = abstract_model(config, np.dtype(param_dtype).name)
        self._num_layers = config.num_layers
        self.runs = runs_of_kinds(kinds, config.num_layers) if kinds else (range(config.num_layers),)
        self._shapes = {
            "/".join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.split(self.abstract)[1])
        }
        self._seen: dict[str, set[int | None]] = {path: set() for path in self._shapes}

    def place(self, path: str, layer: int | None) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The path of the parameter in the model of `runs`, the tensor's index in it, and the size of its stack."""
        if layer is None:
            return path, (), ()
        run = self._run(layer)
        return stacked_path(path, run, self._num_layers), (layer - run.start,), (len(run),)

    def is_complete(self, path: str, layer: int | None) -> bool:
        """Whether all tensors of a parameter, or of the run of layers that this one is in, have been added."""
        if layer is None:
            return None in self._seen[path]
        run = self._run(layer)
        return len(run) <= len(self._seen[path]) and self._seen[path].issuperset(run)

    def _has_all(self, path: str) -> bool:
        return len(self._seen[path]) == (self._num_layers if _is_stacked(path) else 1)

    def _run(self, layer: int) -> range:
        return next(run for run in self.runs if layer in run)

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
            if not self._has_all(path)
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

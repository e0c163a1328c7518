"""Builds a `Transformer` from a stream of named tensors, with checks and without a second copy of the weights."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    kinds_of_stacks,
    runs_of_kinds,
    stacked_path,
    with_packed_kernels,
    without_expert,
)
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import run_of_name
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
        "layers/attention/q_proj/kernel", or of an expert "layers/ffn/experts/3/up_proj/kernel"; the layer
        is None outside "layers/"; the float array, `LazyTensor` or `PackedTensor`, has the parameter's
        orientation (kernels are [in, out]) without the axes of layers and experts.
      param_dtype: dtype of the float parameters and of the computation.
      kinds: of all packed tensors, by path and layer.

    Raises:
      ValueError: a tensor is missing, unexpected or duplicate, has the wrong shape or a layer
        out of range, or holds values that are not finite in `param_dtype`; experts of a layer that are
        packed differently.
    """
    kinds = kinds_of_stacks(kinds, 1 if config.experts is None else config.experts.count)
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
        self._num_experts = 0 if config.experts is None else config.experts.count
        self._alike = config.runs  # layers that have the same parameters
        self.runs = runs_of_kinds(kinds, config.runs)
        # Of one tensor, by path and run of layers; the run is None outside the layers.
        self._shapes: dict[str, dict[range | None, tuple[int, ...]]] = {}
        for names, variable in nnx.to_flat_state(nnx.split(self.abstract)[1]):
            run, names = self._run_of_parameter(names)
            path, axes = "/".join(names), 0 if run is None else 1
            axes += _has_experts(path)
            self._shapes.setdefault(path, {})[run] = tuple(variable.shape[axes:])
        self._seen: dict[str, set[tuple[int | None, int | None]]] = {path: set() for path in self._shapes}
        self._added = collections.Counter()

    def _run_of_parameter(self, names: tuple[Any, ...]) -> tuple[range | None, tuple[Any, ...]]:
        """The run of a parameter's layers, and its path without the run."""
        if names[0] != "layers":
            return None, names
        if len(self._alike) == 1:
            return self._alike[0], names
        return run_of_name(names[1]), (names[0], *names[2:])

    def place(self, path: str, layer: int | None) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The path of the parameter in the model of `runs`, the tensor's index in it, and the sizes of its stack."""
        if layer is None:
            return path, (), ()
        run, (together, expert) = _run_of(layer, self.runs), without_expert(path)
        stacked = stacked_path(together, run, self._num_layers)
        if expert is None:
            return stacked, (layer - run.start,), (len(run),)
        return stacked, (layer - run.start, expert), (len(run), self._num_experts)

    def is_complete(self, path: str, layer: int | None) -> bool:
        """Whether all tensors of a parameter, or of the run of layers that this one is in, have been added."""
        stacked, _, stack = self.place(path, layer)
        return self._added[stacked] == math.prod(stack)

    def _num_tensors(self, path: str) -> int:
        layers = sum(1 if run is None else len(run) for run in self._shapes[path])
        return layers * (self._num_experts if _has_experts(path) else 1)

    def _tensors(self, path: str) -> Iterator[tuple[int | None, int | None]]:
        """Layer and expert of each tensor of a parameter, one by one: a damaged config may ask for billions."""
        for run in self._shapes[path]:
            for layer in (None,) if run is None else run:
                for expert in range(self._num_experts) if _has_experts(path) else (None,):
                    yield layer, expert

    def add(self, path: str, layer: int | None, shape: tuple[int, ...]) -> None:
        """Adds one tensor. Raises ValueError if the model does not require it."""
        name, (together, expert) = _name(path, layer), without_expert(path)
        if together not in self._shapes:
            raise ValueError(f"unexpected tensor {name:.200}: the model has only {', '.join(sorted(self._shapes))}")
        if _is_stacked(path) != (layer is not None):
            raise ValueError(f"tensor {path} has {layer=}: tensors under 'layers/' need a layer, others must have None")
        if layer is not None and not 0 <= layer < self._num_layers:
            raise ValueError(f"tensor {name} is of layer {layer}, but the config has num_layers={self._num_layers}")
        if _has_experts(together) and not (expert is not None and expert < self._num_experts):
            raise ValueError(f"tensor {name} is of expert {expert}, but the config has {self._num_experts} experts")
        run = None if layer is None else _run_of(layer, self._alike)
        if run not in self._shapes[together]:
            raise ValueError(f"unexpected tensor {name}: the config says that layer {layer} is of another kind")
        expected = self._shapes[together][run]
        if tuple(shape) != expected:
            raise ValueError(
                f"tensor {name} has shape {tuple(shape)}, but the config asks for {expected}: "
                "the file's config and its weights disagree"
            )
        if (layer, expert) in self._seen[together]:
            raise ValueError(f"tensor {name} occurs twice: every parameter must occur once")
        self._seen[together].add((layer, expert))
        self._added[self.place(path, layer)[0]] += 1

    def check_complete(self) -> None:
        """Raises ValueError if a tensor is missing."""
        missing = (
            _name(path if expert is None else path.replace("experts/", f"experts/{expert}/", 1), layer)
            for path in self._shapes
            if len(self._seen[path]) < self._num_tensors(path)
            for layer, expert in self._tensors(path)
            if (layer, expert) not in self._seen[path]
        )
        named = list(itertools.islice(missing, _MOST_NAMED))
        if named:
            count = sum(self._num_tensors(path) - len(seen) for path, seen in self._seen.items())
            more = f" and {count - len(named)} more" if count > len(named) else ""
            raise ValueError(
                f"missing tensors {', '.join(named)}{more}: the file is incomplete, or its config is wrong"
            )


def _run_of(layer: int, runs: Sequence[range]) -> range:
    return next(run for run in runs if layer in run)


def _has_experts(path: str) -> bool:
    """Whether a parameter of a layer is one of its experts."""
    return "/experts/" in path


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _name(path: str, layer: int | None) -> str:
    """Name for messages, such as "layers/7/attention/q_proj/kernel"."""
    return path if layer is None else path.replace("layers/", f"layers/{layer}/", 1)

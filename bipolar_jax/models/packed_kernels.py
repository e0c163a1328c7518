"""Packed kernels of a model that is loaded: what is known of them before they are read, and their host buffers."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Integer, UInt8, UInt32

from bipolar_jax.format import as_format
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Linear, Packed
from bipolar_jax.nn.compressible import layer_at, run_name
from bipolar_jax.nn.layers.linear import InputOrder
from bipolar_jax.packing import BipolarArray, BlockScaledArray, from_codes
from bipolar_jax.packing.block_scaled_array import BlockForm
from bipolar_jax.packing.host_memory import aligned_empty
from bipolar_jax.packing.words import pack_codes
from bipolar_jax.quantize import Precision
from bipolar_jax.quantize.groups import num_groups

_STACK = "layers/"
_EXPERT = re.compile(r"(layers/(?:.+/)?experts/)(\d+)/(.+)")
_BLOCK_NUMBERS = 1 << 21


@dataclasses.dataclass(frozen=True)
class PackedKind:
    """How a kernel is packed; layers that are stacked have equal kinds.

    Attributes:
      precision: of the layer; its scales are floats.
      has_offset: whether numbers have an offset.
      ordered: whether the layer reads its inputs in another order, see `Linear.order`.
      form: of scales that stay as a GGUF file has them, in a `BlockScaledArray`; None for a `BipolarArray`.
      axis: -2 for kernels, -1 for tables of embeddings.
    """

    precision: Precision
    has_offset: bool
    ordered: bool = False
    form: BlockForm | None = None
    axis: int = -2


@dataclasses.dataclass(frozen=True)
class PackedNumbers:
    """The numbers of one kernel, or of some of its outputs, on the host: scale * (2 code - W) + offset.

    Attributes:
      codes: unsigned, of every output.
      scale, offset: of the groups of its inputs, see `packing.from_codes`; offset is None where the kind has none. Of a
        kind with a form, the block_scale and block_minimum of `BlockScaledArray`.
      order: see `Linear.order`; None keeps the order of the inputs.
      group_scales, group_minimums: see `BlockScaledArray`.
    """

    codes: UInt8[np.ndarray, "n k"]
    scale: Float[np.ndarray, "n groups"]
    offset: Float[np.ndarray, "n groups"] | None
    order: Int32[np.ndarray, " k"] | None = None
    group_scales: Integer[np.ndarray, "n groups"] | None = None
    group_minimums: Integer[np.ndarray, "n groups"] | None = None

    def rows(self, rows: slice) -> PackedNumbers:
        """Those of some outputs."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "order"}
        return PackedNumbers(**{name: None if array is None else array[rows] for name, array in arrays.items()})


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A kernel that is read when its turn comes.

    Attributes:
      shape: the parameter's: (k, n), or (n, k) of a table.
      kind: how it is packed.
      read: reads the numbers, or those of some outputs after the others. Raises ValueError for damage.
    """

    shape: tuple[int, int]
    kind: PackedKind
    read: Callable[[], PackedNumbers | Iterator[PackedNumbers]]


def check_activations(activations: Any) -> None:
    """Raises ValueError unless the bits of activations that a loader is given are None, 1 to 8, or 16 for floats."""
    if activations is not None and (type(activations) is not int or activations not in (*range(1, 9), 16)):
        raise ValueError(f"activations must be 1 to 8 bits, or 16 for floats, got {activations!r:.40}")


class PackedBuffer:
    """Host memory of one kernel, or of a run of stacked ones, that JAX takes over on CPUs."""

    def __init__(self, stack: tuple[int, ...], tensor: PackedTensor):
        """Allocates the leaves for kernels like `tensor`, with the axes `stack` before their own."""
        kernel, order = abstract_kernel(tensor.kind, tensor.shape)
        self.kind = tensor.kind
        self._kernel = jax.tree.map(lambda leaf: aligned_empty((*stack, *leaf.shape), leaf.dtype), kernel)
        self._order = None if order is None else aligned_empty((*stack, *order.shape), order.dtype)

    def fill(self, index: tuple[int, ...], numbers: PackedNumbers | Iterator[PackedNumbers]) -> None:
        """Packs the numbers of one kernel. Raises ValueError for scales or offsets that are not finite."""
        first = 0
        for block in [numbers] if isinstance(numbers, PackedNumbers) else numbers:
            self._fill_rows(index, first, block)
            first += len(block.codes)

    def _fill_rows(self, index: tuple[int, ...], first: int, numbers: PackedNumbers) -> None:
        """Packs the numbers of outputs from `first` on."""
        for name in ("scale", "offset"):
            array = getattr(numbers, name)
            if array is not None and (bad := array.size - int(np.count_nonzero(np.isfinite(array)))):
                raise ValueError(f"{bad} of its {array.size} numbers of {name} are not finite: the file is damaged")
        n, k = numbers.codes.shape
        step = max(1, _BLOCK_NUMBERS // k)  # outputs, so that what is made on the way stays small
        for start in range(0, n, step):
            block = numbers.rows(slice(start, min(start + step, n)))
            rows = slice(first + start, first + start + len(block.codes))
            packed = _packed(block, self.kind)
            for target, leaf in zip(jax.tree.leaves(self._kernel), jax.tree.leaves(packed), strict=True):
                target[index][..., rows, :] = np.asarray(leaf)
        if self._order is not None:
            self._order[index] = np.arange(k, dtype=np.int32) if numbers.order is None else numbers.order

    def finish(self) -> tuple[BipolarArray, Array | None]:
        """The kernel and the order of its inputs, on the device. The buffer is given away."""
        kernel, order, self._kernel, self._order = self._kernel, self._order, None, None
        leaves, structure = jax.tree.flatten(kernel)
        del kernel
        leaves = [jax.device_put(leaves.pop(0)) for _ in range(len(leaves))]
        return jax.tree.unflatten(structure, leaves), None if order is None else jax.device_put(order)


def _packed(numbers: PackedNumbers, kind: PackedKind) -> BipolarArray | BlockScaledArray:
    """The kernel of some outputs; also of shapes and dtypes, within `jax.eval_shape`."""
    bits, group_size = kind.precision.w_bits, kind.precision.group_size
    if kind.form is None:
        return _with_float_scales(numbers.codes, numbers.scale, numbers.offset, bits, group_size, kind.axis)
    return BlockScaledArray(
        _planes(numbers.codes, bits),
        numbers.scale,
        numbers.offset,
        numbers.group_scales,
        numbers.group_minimums,
        as_format(bits),
        numbers.codes.shape[1],
        kind.axis,
        group_size,
        kind.form,
    )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _with_float_scales(codes, scale, offset, bits, group_size, axis) -> BipolarArray:
    packed = from_codes(codes, bits, -1, scale, offset, group_size)
    return packed if axis == -1 else packed.T


@functools.partial(jax.jit, static_argnums=1)
def _planes(codes, bits) -> UInt32[Array, "planes n words"]:
    return pack_codes(codes, as_format(bits))


def abstract_kernel(
    kind: PackedKind, shape: tuple[int, int]
) -> tuple[BipolarArray | BlockScaledArray, jax.ShapeDtypeStruct | None]:
    """Shapes and dtypes of a kernel of a parameter's shape, and of the order of its inputs."""
    k, n = shape if kind.axis == -2 else shape[::-1]
    form = kind.form

    def leaf(size: int | None, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, num_groups(k, size)), dtype)

    codes = jax.ShapeDtypeStruct((n, k), jnp.uint8)
    if form is None:
        scale = leaf(kind.precision.group_size, jnp.float32)
        numbers = (codes, scale, scale if kind.has_offset else None)
    else:
        scale = leaf(form.block_size, jnp.float16)
        integers = leaf(kind.precision.group_size, jnp.int8 if form.group_scales == "int8" else jnp.uint8)
        numbers = (codes, scale, scale if form.minimum else None, None)
        numbers += (None if form.group_scales is None else integers, integers if form.has_group_minimums else None)
    kernel = jax.eval_shape(lambda *arrays: _packed(PackedNumbers(*arrays), kind), *numbers)
    return kernel, jax.ShapeDtypeStruct((k,), jnp.int32) if kind.ordered else None


def unified(kinds: Mapping[tuple[str, int | None], PackedKind]) -> dict[tuple[str, int | None], PackedKind]:
    """The kinds by path and layer; if one layer of a stack is ordered, all its packed layers are."""
    ordered = {without_expert(path)[0] for (path, _), kind in kinds.items() if kind.ordered}
    return {key: dataclasses.replace(kind, ordered=without_expert(key[0])[0] in ordered) for key, kind in kinds.items()}


def without_expert(path: str) -> tuple[str, int | None]:
    """The path of a parameter of all experts, and the expert; from that of one, "layers/ffn/experts/3/up_proj/kernel".

    Other paths stay as they are, with None.
    """
    match = _EXPERT.fullmatch(path)
    return (path, None) if match is None else (match[1] + match[3], int(match[2]))


def parameter_order(path: str, layer: int | None) -> tuple[str, int, int]:
    """Sorts tensors in the order of parameters, so that `assemble` completes one before it starts the next."""
    together, expert = without_expert(path)
    return together, -1 if layer is None else layer, -1 if expert is None else expert


def kinds_of_stacks(
    kinds: Mapping[tuple[str, int | None], PackedKind], num_experts: int
) -> dict[tuple[str, int | None], PackedKind]:
    """The kinds by path and layer, of all experts of a layer together.

    Raises:
      ValueError: experts of one layer that are packed differently, or of which some are float.
    """
    stacks: dict[tuple[str, int | None], list[PackedKind]] = {}
    for (path, layer), kind in kinds.items():
        (together, expert) = without_expert(path)
        stacks.setdefault((together, layer), []).extend([kind] if expert is not None else [kind] * num_experts)
    for (path, layer), found in stacks.items():
        if len(found) != num_experts or len({*found}) > 1:
            how = f"{len(found)} of {num_experts} packed" if len(found) != num_experts else "packed differently"
            raise ValueError(
                f"the experts of layer {layer} are {how} in {path}: experts of a layer are one stack, so quantize all "
                "of them alike"
            )
    return {key: found[0] for key, found in stacks.items()}


def runs_of_kinds(kinds: Mapping[tuple[str, int | None], PackedKind], runs: Sequence[range]) -> tuple[range, ...]:
    """Runs of layers within which every kernel has one kind, or is float; `runs` are cut, but not joined."""
    paths = {path for path, layer in kinds if layer is not None}
    if not paths:
        return tuple(runs)
    starts = [
        layer
        for run in runs
        for layer in run
        if layer == run.start or any(kinds.get((path, layer)) != kinds.get((path, layer - 1)) for path in paths)
    ]
    return tuple(range(*ends) for ends in zip(starts, [*starts[1:], runs[-1].stop], strict=True))


def stacked_path(path: str, run: range, num_layers: int) -> str:
    """The path of a parameter in a model whose layers are cut into runs."""
    if not path.startswith(_STACK) or len(run) == num_layers:
        return path
    return f"{_STACK}{run_name(run)}/{path.removeprefix(_STACK)}"


def with_packed_kernels(
    model: Transformer, runs: Sequence[range], kinds: Mapping[tuple[str, int | None], PackedKind]
) -> Transformer:
    """Shapes and dtypes of the model with packed layers in place of float ones.

    Args:
      model: shapes and dtypes of the float model.
      runs: see `runs_of_kinds`.
      kinds: of the packed kernels, by their paths in the float model, such as "layers/ffn/up_proj/kernel".
    """
    num_layers = model.config.num_layers

    def build(model: Transformer) -> Transformer:
        model = model.with_runs(runs)
        for (path, layer), kind in kinds.items():
            run = next((run for run in runs if layer is not None and run.start == layer), None)
            if layer is not None and run is None:
                continue
            where = stacked_path(path, run or range(0), num_layers).rpartition("/")[0]
            parent, _, name = where.rpartition("/")
            module = layer_at(model, parent) if parent else model
            layer = getattr(module, name)
            weights = layer.embedding if kind.axis == -1 else layer.kernel
            setattr(module, name, _packed_layer(layer, kind, weights.get_value().shape[:-2]))
        return model

    return nnx.eval_shape(build, model)


def _packed_layer(layer: nnx.Linear | nnx.Embed, kind: PackedKind, stack: tuple[int, ...]) -> Linear | Embed:
    weights = layer.embedding if kind.axis == -1 else layer.kernel
    kernel, order = abstract_kernel(kind, weights.get_value().shape[-2:])
    kernel = jax.tree.map(lambda leaf: jnp.zeros((*stack, *leaf.shape), leaf.dtype), kernel)
    if kind.axis == -1:
        table = Embed.from_float(layer, kind.precision)
        table.embedding = Packed(kernel)
        return table
    packed = Linear.from_packed(layer, kernel, kind.precision)
    if order is not None:
        packed.order = InputOrder(jnp.zeros((*stack, *order.shape), order.dtype))
    return packed

"""What the formats share: the tensors of one quantized layer, and codes with float scales to our numbers."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Integer, Shaped, UInt8

from bipolar_jax.format import as_format
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.safetensors_files import SafetensorsFiles
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor
from bipolar_jax.quantize import Precision
from bipolar_jax.quantize.groups import group_lengths, num_groups

FLOATS = ("F32", "F16", "BF16")


class QuantizedFormat(Protocol):
    """A format as a checkpoint's config describes it.

    Attributes:
      marker: suffix of the tensor that only quantized layers have.
      suffixes: of all tensors of a quantized layer but its bias.
    """

    marker: str
    suffixes: tuple[str, ...]

    def tensor(self, module: Module) -> PackedTensor:
        """The kernel of a layer, to be read later. Raises ValueError for shapes or dtypes that the format excludes."""


@dataclasses.dataclass(frozen=True)
class Module:
    """The stored tensors of one layer.

    Attributes:
      name: of the layer, such as "model.layers.0.mlp.up_proj".
      files: where they are.
    """

    name: str
    files: SafetensorsFiles

    def has(self, suffix: str) -> bool:
        """Whether a tensor is stored."""
        return f"{self.name}.{suffix}" in self.files

    def shape(self, suffix: str, dtypes: tuple[str, ...], ndim: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises ValueError if it is missing, or of other dtypes or axes."""
        name = f"{self.name}.{suffix}"
        if name not in self.files:
            raise ValueError(f"the quantized layer {self.name!r:.200} lacks {suffix}: the file is incomplete")
        stored = self.files.stored(name)
        if stored.dtype not in dtypes or len(stored.shape) != ndim or 0 in stored.shape:
            raise ValueError(
                f"tensor {name!r:.200} is {stored.dtype:.20} of shape {list(stored.shape)}, the format asks for "
                f"{' or '.join(dtypes)} with {ndim} axes"
            )
        return stored.shape

    def read(self, suffix: str) -> Shaped[np.ndarray, "..."]:
        """The tensor, whole."""
        return self.files.read(f"{self.name}.{suffix}")

    def check(self, suffix: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Raises ValueError if a shape is not the expected one."""
        if tuple(found) != tuple(expected):
            raise ValueError(
                f"tensor {self.name}.{suffix} has shape {list(found)}, but the layer's others and the config ask for "
                f"{list(expected)}"
            )


def affine_kind(
    bits: int,
    group_size: int | None,
    k: int,
    a_bits: int | None,
    *,
    ordered: bool = False,
    a_symmetric: bool = False,
) -> PackedKind:
    """The kind of a layer of k inputs whose weights are d (q - z), q and z integers; a_bits None is float inputs."""
    whole = group_size is None or group_size >= k
    precision = Precision(bits, a_bits, None if whole else group_size, "minmax", "float", a_symmetric=a_symmetric)
    return PackedKind(precision, has_offset=True, ordered=ordered)


def affine_numbers(
    codes: UInt8[np.ndarray, "n k"],
    step: Shaped[np.ndarray, "n groups"],
    zero: Integer[np.ndarray, "n groups"] | int,
    kind: PackedKind,
    order: Integer[np.ndarray, " k"] | None = None,
) -> PackedNumbers:
    """Weights d (q - z), exact where d is a 16-bit float: scale d / 2 and offset d ((2^bits - 1) / 2 - z).

    Groups of negative steps are complemented: q and z become 2^bits - 1 less themselves, which is exact.

    Args:
      codes: q.
      step: d of every output and group.
      zero: z.
      kind: see `affine_kind`.
      order: see `Linear.order`; the codes are in it.
    """
    most = as_format(kind.precision.w_bits).max_value
    step, zero = step.astype(np.float32), np.broadcast_to(np.asarray(zero, np.int32), step.shape)
    if (negative := step < 0).any():
        lengths = group_lengths(codes.shape[1], kind.precision.group_size)
        codes = np.where(np.repeat(negative, lengths, axis=1), np.uint8(most) - codes, codes)
        step, zero = np.abs(step), np.where(negative, most - zero, zero)
    offset = step * (np.float32(most / 2) - zero.astype(np.float32))
    order = None if order is None else order.astype(np.int32)
    return PackedNumbers(codes, step / 2, offset, order)


def order_of_groups(
    group_of: Integer[np.ndarray, " k"], group_size: int, name: str
) -> Integer[np.ndarray, " k"] | None:
    """The order that makes inputs of one group neighbours, or None if they are.

    Args:
      group_of: the group of every input: the format's g_idx.
      group_size: inputs of a group.
      name: of the tensor, for errors.

    Raises:
      ValueError: groups that do not have `group_size` inputs each, but for the last.
    """
    k = len(group_of)
    expected = np.arange(k) // group_size
    if np.array_equal(group_of, expected):
        return None
    order = np.argsort(group_of, kind="stable")
    if not np.array_equal(group_of[order], expected):
        raise ValueError(f"{name} does not have {group_size} inputs in each of {num_groups(k, group_size)} groups")
    return order


def group_size_of(fields: Fields, name: str = "group_size") -> int | None:
    """A group size as configs state it: -1 or null is one group. Raises ValueError for other than positive integers."""
    value = fields.get(name)
    if value is None or (type(value) is int and value == -1):
        return None
    if type(value) is not int or not 1 <= value < 2**31:
        raise fields.wrong(name, value, "a positive integer, or -1 for one group")
    return value


def spread(numbers: Shaped[np.ndarray, "..."], rows: int, groups: int) -> Shaped[np.ndarray, "rows groups"]:
    """The numbers of every row and group: stored ones may be one for all, or one for each row."""
    return np.broadcast_to(numbers.reshape(len(numbers), -1), (rows, groups))

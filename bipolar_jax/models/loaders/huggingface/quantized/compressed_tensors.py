"""compressed-tensors: formats "pack-quantized" and "int-quantized" (checked against its version 0.20.1).

A layer has weights d (q - z) with signed q and z of 1 to 8 bits:

- pack-quantized: weight_packed int32 [n, words] of q + 2^(bits-1) along k, and weight_shape. Older versions leave
  32 % bits bits of every word unused, newer ones none: the number of words tells them apart;
- int-quantized: weight int8 [n, k];
- weight_scale: d, [n, groups], [n, 1] or one number;
- weight_zero_point: z, if the weights are not symmetric; of pack-quantized layers packed likewise along n;
- weight_g_idx int32 [k]: the group of each input; -1 everywhere says nothing.

Which layers, and with what arguments, `config_groups` says. Activations that it rounds token by token are rounded on
the grid that it states: symmetric, q = round(x / d) with d = 2 max|x| / (2^bits - 1), or from a token's smallest to its
largest number, zero included.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.quantized.module import (
    FLOATS,
    Module,
    affine_kind,
    affine_numbers,
    group_size_of,
    order_of_groups,
    spread,
)
from bipolar_jax.models.loaders.huggingface.quantized.targets import Targets
from bipolar_jax.models.loaders.huggingface.quantized.words import unpack_either
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor
from bipolar_jax.quantize.groups import num_groups

_FORMATS = ("pack-quantized", "int-quantized")
_STRATEGIES = ("tensor", "channel", "group")
_STATIC = "give activations=8 to round every token as it comes, or 16 for float ones"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a group of layers is stored.

    Attributes:
      targets: the layers.
      bits: of weights.
      symmetric: whether there are no zeros.
      strategy: what shares a scale: "tensor", "channel" or "group".
      group_size: inputs of a group, or None.
      packed: whether the format is pack-quantized.
      a_bits: of activations; None leaves them float.
      a_symmetric: whether the grids of tokens are symmetric.
    """

    targets: Targets
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    packed: bool
    a_bits: int | None
    a_symmetric: bool = False

    @property
    def zeros_are_packed(self) -> bool:
        """Whether zeros are words, too."""
        return self.packed and self.strategy != "tensor"


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """The format; see `QuantizedFormat`."""

    schemes: tuple[Scheme, ...]
    marker = "weight_scale"
    suffixes = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )

    @classmethod
    def of(cls, fields: Fields, a_bits: int | None, stated: bool) -> CompressedTensors:
        """The format that a quantization_config states.

        Args:
          fields: the quantization_config.
          a_bits: of activations, if the caller chooses them; None is float ones.
          stated: whether the file's own are taken instead.

        Raises:
          ValueError: one that is not served.
        """
        if fields.get("kv_cache_scheme"):
            raise ValueError(
                f"{fields.source} has a kv_cache_scheme: give cache_bits to generate instead, and remove it"
            )
        if fields.nested("sparsity_config").get("format", "dense") != "dense":
            raise ValueError(f"{fields.source} has a sparsity_config: sparse checkpoints are not served")
        groups = fields.nested("config_groups")
        if not groups.values:
            raise fields.wrong("config_groups", groups.values, "an object with a group of layers")
        found = [_scheme(groups.nested(name), fields.get("format"), a_bits, stated) for name in groups.values]
        found.sort(key=lambda scheme: scheme.targets.order)
        return cls(tuple(found))

    def tensor(self, module: Module) -> PackedTensor:
        """See `QuantizedFormat`; reads weight_shape and weight_g_idx."""
        scheme = next((scheme for scheme in self.schemes if scheme.targets.match(module.name)), None)
        if scheme is None:
            raise ValueError(f"layer {module.name!r:.200} is quantized, but no config_groups targets it")
        n, k = self._shape(module, scheme)
        groups = num_groups(k, scheme.group_size)
        rows = 1 if scheme.strategy == "tensor" else n
        _check_spread(module, "weight_scale", FLOATS, rows, groups)
        if not scheme.symmetric and scheme.zeros_are_packed:
            _, columns = module.shape("weight_zero_point", ("I32",), 2)
            module.check("weight_zero_point", (columns,), (groups,))
        elif not scheme.symmetric:
            _check_spread(module, "weight_zero_point", ("I8",), rows, groups)
        order = None
        if module.has("weight_g_idx") and scheme.group_size is not None:
            module.check("weight_g_idx", module.shape("weight_g_idx", ("I32", "I64"), 1), (k,))
            group_of = module.read("weight_g_idx")
            if not (group_of == -1).all():
                order = order_of_groups(group_of, scheme.group_size, f"{module.name}.weight_g_idx")
        kind = affine_kind(
            scheme.bits,
            scheme.group_size,
            k,
            scheme.a_bits,
            ordered=order is not None,
            a_symmetric=scheme.a_symmetric,
        )
        return PackedTensor((k, n), kind, functools.partial(self._read, module, scheme, n, k, order, kind))

    def _shape(self, module: Module, scheme: Scheme) -> tuple[int, int]:
        if not scheme.packed:
            return module.shape("weight", ("I8",), 2)
        rows, words = module.shape("weight_packed", ("I32",), 2)
        module.check("weight_shape", module.shape("weight_shape", ("I32", "I64"), 1), (2,))
        n, k = map(int, module.read("weight_shape"))
        if n != rows or not 1 <= k <= 32 * words:
            raise ValueError(f"tensor {module.name}.weight_shape is {[n, k]}, its words are {[rows, words]}")
        return n, k

    def _read(
        self, module: Module, scheme: Scheme, n: int, k: int, order: np.ndarray | None, kind: PackedKind
    ) -> PackedNumbers:
        half = 1 << (scheme.bits - 1)
        groups = num_groups(k, scheme.group_size)
        if scheme.packed:
            codes = unpack_either(module.read("weight_packed"), scheme.bits, k)
        else:
            codes = _unsigned(module.read("weight"), scheme.bits)
        codes = codes if order is None else np.take(codes, order, axis=1)
        zero: Integer[np.ndarray, "n groups"] | int = half
        if not scheme.symmetric:
            zero = self._zeros(module, scheme, n, groups)
        return affine_numbers(codes, spread(module.read("weight_scale"), n, groups), zero, kind, order)

    def _zeros(self, module: Module, scheme: Scheme, n: int, groups: int) -> UInt8[np.ndarray, "n groups"]:
        """Zeros as unsigned codes."""
        stored = module.read("weight_zero_point")
        if scheme.zeros_are_packed:
            return unpack_either(stored.T, scheme.bits, n).T
        return spread(_unsigned(stored, scheme.bits), n, groups)


def _check_spread(module: Module, suffix: str, dtypes: tuple[str, ...], rows: int, groups: int) -> None:
    """Raises ValueError unless a tensor has one number for each row and group, or one for each row if groups is 1."""
    if not module.has(suffix) or len(module.files.stored(f"{module.name}.{suffix}").shape) != 1:
        module.check(suffix, module.shape(suffix, dtypes, 2), (rows, groups))
    elif groups == 1:
        module.check(suffix, module.shape(suffix, dtypes, 1), (rows,))
    else:
        module.shape(suffix, dtypes, 2)


def _unsigned(values: Integer[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, "..."]:
    """Signed integers plus 2^(bits-1). Raises ValueError for others than of so many bits."""
    half = 1 << (bits - 1)
    if values.min() < -half or values.max() >= half:
        raise ValueError(f"it holds integers from {values.min()} to {values.max()}, outside those of {bits} bits")
    return (values.astype(np.int16) + half).astype(np.uint8)


def _scheme(fields: Fields, whole_format: Any, a_bits: int | None, stated: bool) -> Scheme:
    """One of the config_groups. Raises ValueError for one that is not served."""
    targets = Targets.of(fields, "targets")
    kind = fields.get("format", whole_format)
    weights, source = fields.nested("weights"), fields.source
    bits, number = weights.get("num_bits", 8), weights.get("type", "int")
    if number != "int":
        raise ValueError(f"{source} has weights of {bits} bits of type {number!r:.20}: floats are no integer grid")
    if kind not in _FORMATS:
        raise fields.wrong("format", kind, " or ".join(_FORMATS))
    if type(bits) is not int or not 1 <= bits <= 8:
        raise weights.wrong("num_bits", bits, "1 to 8")
    group_size = group_size_of(weights)
    default = "group" if group_size else "tensor" if weights.get("group_size") is None else "channel"
    strategy = weights.get("strategy", default)
    if strategy not in _STRATEGIES:
        raise weights.wrong("strategy", strategy, ", ".join(_STRATEGIES))
    if (strategy == "group") != (group_size is not None):
        raise weights.wrong("group_size", group_size, f"one that fits the strategy {strategy}")
    if fields.get("output_activations"):
        raise ValueError(f"{source} has output_activations: outputs of layers are not rounded")
    a_symmetric = False
    if stated:
        activations = fields.nested("input_activations")
        a_bits = _activation_bits(activations)
        a_symmetric = a_bits is not None and a_bits > 1 and activations.flag("symmetric", True)
    symmetric = weights.flag("symmetric", True)
    return Scheme(targets, bits, symmetric, strategy, group_size, kind == "pack-quantized", a_bits, a_symmetric)


def _activation_bits(fields: Fields) -> int | None:
    """Bits of activations, None for float ones. Raises ValueError for what we do not compute."""
    if not fields.values:
        return None
    bits = fields.get("num_bits", 8)
    if fields.get("type", "int") != "int" or type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"{fields.source} has input_activations of {bits!r:.20} bits that are no integers: {_STATIC}")
    if fields.get("dynamic", False) is not True or fields.get("strategy", "token") != "token":
        raise ValueError(
            f"{fields.source} has input_activations with static scales, or scales of tensors or groups: {_STATIC}"
        )
    return bits

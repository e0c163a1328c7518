"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) as AutoGPTQ and GPTQModel store it.

A layer has weights d (q - z):

- qweight int32 [k bits / 32, n]: q in 0 ... 2^bits - 1, a dense stream along k for each output;
- qzeros int32 [groups, n bits / 32]: a dense stream along n for each group. Format "gptq" (v1) has z - 1 modulo
  2^bits, format "gptq_v2" has z;
- scales [groups, n]: d;
- g_idx int32 [k]: the group of each input. With desc_act (act-order) neighbours are in different groups.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.quantized.module import (
    FLOATS,
    Module,
    affine_kind,
    affine_numbers,
    group_size_of,
    order_of_groups,
)
from bipolar_jax.models.loaders.huggingface.quantized.words import num_dense_words, unpack_dense
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor
from bipolar_jax.quantize.groups import num_groups

_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """The format; see `QuantizedFormat`.

    Attributes:
      bits: of the weights.
      group_size: inputs that share a scale; None for all.
      zero_shift: what is added to a stored zero.
      a_bits: of activations; None leaves them float.
    """

    bits: int
    group_size: int | None
    zero_shift: int
    a_bits: int | None
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def of(cls, fields: Fields, a_bits: int | None) -> GPTQ:
        """The format that a quantization_config states. Raises ValueError for one that is not served."""
        bits = fields.get("bits")
        if type(bits) is not int or bits not in _BITS:
            raise fields.wrong("bits", bits, f"{', '.join(map(str, _BITS))} for GPTQ")
        version = fields.get("checkpoint_format", "gptq")
        if not isinstance(version, str) or version not in _VERSIONS:
            raise fields.wrong("checkpoint_format", version, " or ".join(_VERSIONS))
        overrides = fields.nested("dynamic").values
        if changed := [pattern for pattern, value in overrides.items() if not pattern.startswith("-:") and value]:
            raise ValueError(
                f"{fields.source} gives layers that match {changed[0]!r:.80} settings of their own (dynamic): "
                "only the same bits and groups for all quantized layers are served"
            )
        return cls(bits, group_size_of(fields), _VERSIONS[version], a_bits)

    def tensor(self, module: Module) -> PackedTensor:
        """See `QuantizedFormat`; reads g_idx."""
        words, n = module.shape("qweight", ("I32",), 2)
        k = words * 32 // self.bits
        if num_dense_words(k, self.bits) != words or (k * self.bits) % 32:
            raise ValueError(f"tensor {module.name}.qweight has {words} rows, of {self.bits}-bit inputs")
        groups = num_groups(k, self.group_size)
        module.check("scales", module.shape("scales", FLOATS, 2), (groups, n))
        module.check("qzeros", module.shape("qzeros", ("I32",), 2), (groups, num_dense_words(n, self.bits)))
        order = None
        if module.has("g_idx") and self.group_size is not None:
            module.check("g_idx", module.shape("g_idx", ("I32", "I64"), 1), (k,))
            order = order_of_groups(module.read("g_idx"), self.group_size, f"{module.name}.g_idx")
        kind = affine_kind(self.bits, self.group_size, k, self.a_bits, ordered=order is not None)
        return PackedTensor((k, n), kind, functools.partial(self._read, module, k, n, order, kind))

    def _read(self, module: Module, k: int, n: int, order: np.ndarray | None, kind: PackedKind) -> PackedNumbers:
        codes = unpack_dense(module.read("qweight").T, self.bits, k)
        codes = codes if order is None else np.take(codes, order, axis=1)
        stored = unpack_dense(module.read("qzeros"), self.bits, n).T.astype(np.int32)
        zero = (stored + self.zero_shift) % (1 << self.bits)
        return affine_numbers(codes, module.read("scales").T, zero, kind, order)

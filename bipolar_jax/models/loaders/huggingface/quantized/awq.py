"""AWQ (Lin et al. 2023, arXiv 2306.00978), version "gemm", as AutoAWQ stores it.

A layer has weights d (q - z) of 4 bits: qweight int32 [k, n / 8], qzeros int32 [groups, n / 8], scales [groups, n].
Nibble i of a word, low bits first, belongs to output 8 w + ORDER[i].
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Integer, UInt8

from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.quantized.module import (
    FLOATS,
    Module,
    affine_kind,
    affine_numbers,
    group_size_of,
)
from bipolar_jax.models.loaders.huggingface.quantized.words import unpack_aligned
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor
from bipolar_jax.quantize.groups import num_groups

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


def unpack_nibbles(words: Integer[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows outputs"]:
    """The integers of 8 outputs for each word, in the order of outputs."""
    nibbles = unpack_aligned(words, _BITS, 8 * words.shape[1])
    in_words = nibbles.reshape(len(words), -1, len(ORDER))[..., np.argsort(ORDER)]
    return in_words.reshape(len(words), -1)


@dataclasses.dataclass(frozen=True)
class AWQ:
    """The format; see `QuantizedFormat`.

    Attributes:
      group_size: inputs that share a scale; None for all.
      a_bits: of activations; None leaves them float.
    """

    group_size: int | None
    a_bits: int | None
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales")

    @classmethod
    def of(cls, fields: Fields, a_bits: int | None) -> AWQ:
        """The format that a quantization_config states. Raises ValueError for one that is not served."""
        bits = fields.get("bits", fields.get("w_bit"))
        if bits != _BITS:
            raise fields.wrong("bits", bits, "4 for AWQ")
        version = fields.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise fields.wrong("version", version, "'gemm': other versions of AWQ store words in other orders")
        if not fields.flag("zero_point", True):
            raise ValueError(f"{fields.source} has zero_point false: AWQ is served with zeros")
        return cls(group_size_of(fields, "q_group_size" if "q_group_size" in fields.values else "group_size"), a_bits)

    def tensor(self, module: Module) -> PackedTensor:
        """See `QuantizedFormat`."""
        k, words = module.shape("qweight", ("I32",), 2)
        n, groups = 8 * words, num_groups(k, self.group_size)
        module.check("scales", module.shape("scales", FLOATS, 2), (groups, n))
        module.check("qzeros", module.shape("qzeros", ("I32",), 2), (groups, words))
        kind = affine_kind(_BITS, self.group_size, k, self.a_bits)
        return PackedTensor((k, n), kind, functools.partial(self._read, module, kind))

    def _read(self, module: Module, kind: PackedKind) -> PackedNumbers:
        codes = np.ascontiguousarray(unpack_nibbles(module.read("qweight")).T)
        return affine_numbers(codes, module.read("scales").T, unpack_nibbles(module.read("qzeros")).T, kind)

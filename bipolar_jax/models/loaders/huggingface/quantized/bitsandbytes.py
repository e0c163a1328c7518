"""bitsandbytes' 8-bit weights (Dettmers et al. 2022, arXiv 2208.07339): weight int8 [n, k], SCB float32 [n].

Weights are q SCB / 127. The file's rule of float products for outlying inputs concerns activations, which are served as
the caller asks; NF4 and FP4 are no integers and are refused.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.quantized.module import Module, affine_kind, affine_numbers
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor

_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class BitsAndBytes:
    """The format; see `QuantizedFormat`. `a_bits` are those of activations; None leaves them float."""

    a_bits: int | None
    marker = "SCB"
    suffixes = ("weight", "SCB", "weight_format")

    @classmethod
    def of(cls, fields: Fields, a_bits: int | None) -> BitsAndBytes:
        """The format that a quantization_config states. Raises ValueError for 4 bits."""
        if not fields.flag("load_in_8bit", False):
            kind = fields.get("bnb_4bit_quant_type", "fp4")
            raise ValueError(
                f"{fields.source} is quantized by bitsandbytes to {kind!s:.20}, whose 16 values are no integer grid: "
                "load the unquantized model and quantize it, for example to W4A16g64"
            )
        return cls(a_bits)

    def tensor(self, module: Module) -> PackedTensor:
        """See `QuantizedFormat`."""
        n, k = module.shape("weight", ("I8",), 2)
        module.check("SCB", module.shape("SCB", ("F32",), 1), (n,))
        if module.has("weight_format") and module.read("weight_format").any():
            raise ValueError(f"tensor {module.name}.weight_format is not 0: only weights stored row by row are served")
        kind = affine_kind(8, None, k, self.a_bits)
        return PackedTensor((k, n), kind, functools.partial(self._read, module, kind))

    def _read(self, module: Module, kind: PackedKind) -> PackedNumbers:
        codes = module.read("weight").view(np.uint8) ^ np.uint8(128)  # q + 128
        return affine_numbers(codes, module.read("SCB")[:, None] / np.float32(_LARGEST), 128, kind)

"""BitNet's ternary weights (arXiv 2402.17764) as transformers packs them.

A layer has weight uint8 [n / 4, k] and weight_scale, one number. Bits 2 i and 2 i + 1 of row r are the code, 1 more
than the ternary weight, of output i n / 4 + r. Layers of class "bitlinear" divide by weight_scale, those of class
"autobitlinear" multiply by it. Activations are 8 bits a token.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import UInt8

from bipolar_jax.format import TERNARY
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.quantized.module import FLOATS, Module
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor
from bipolar_jax.quantize import Precision

ACTIVATION_BITS = 8  # as the format states
_CLASSES = ("bitlinear", "autobitlinear")


def unpack_ternary(packed: UInt8[np.ndarray, "rows k"]) -> UInt8[np.ndarray, "n k"]:
    """Codes 0, 1 and 2 of every output; other codes have no meaning."""
    return np.concatenate([(packed >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)])


@dataclasses.dataclass(frozen=True)
class BitNet:
    """The format; see `QuantizedFormat`.

    Attributes:
      divides: whether weights are the ternary ones divided by the stored scale, not multiplied.
      a_bits: of activations; None leaves them float.
    """

    divides: bool
    a_bits: int | None
    marker = "weight_scale"
    suffixes = ("weight", "weight_scale")

    @classmethod
    def of(cls, fields: Fields, a_bits: int | None) -> BitNet:
        """The format that a quantization_config states. Raises ValueError for one that is not served."""
        kind = fields.get("linear_class", "bitlinear")
        if kind not in _CLASSES:
            raise fields.wrong("linear_class", kind, " or ".join(_CLASSES))
        mode = fields.get("quantization_mode", "offline")
        if mode != "offline":
            raise fields.wrong("quantization_mode", mode, "'offline': weights that are stored packed")
        if fields.flag("use_rms_norm", False):
            raise ValueError(f"{fields.source} has use_rms_norm true: norms within linear layers are not served")
        return cls(kind == "bitlinear", a_bits)

    def tensor(self, module: Module) -> PackedTensor:
        """See `QuantizedFormat`."""
        rows, k = module.shape("weight", ("U8",), 2)
        module.check("weight_scale", module.shape("weight_scale", FLOATS, 1), (1,))
        kind = PackedKind(Precision(TERNARY, self.a_bits), has_offset=False)
        return PackedTensor((k, 4 * rows), kind, functools.partial(self._read, module, 4 * rows))

    def _read(self, module: Module, n: int) -> PackedNumbers:
        codes = unpack_ternary(module.read("weight"))
        if codes.max() > 2:
            raise ValueError("it holds codes above 2, which no ternary weight has: the file is damaged")
        step = module.read("weight_scale").astype(np.float32)
        with np.errstate(divide="ignore"):  # reported as not finite
            step = 1 / step if self.divides else step
        if step < 0:
            raise ValueError(f"its weight_scale is {float(step[0])}, expected a positive number: the file is damaged")
        return PackedNumbers(codes, np.broadcast_to(step / 2, (n, 1)), None)

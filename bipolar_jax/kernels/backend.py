"""What every backend offers."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.packing import BipolarArray


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a backend would do for one product.

    Attributes:
      kernel: in words.
      reason: why this kernel and these tiles.
      tiling: the kernel's tiles, if it has any to choose.
    """

    kernel: str
    reason: str
    tiling: Any = None


class Layer(NamedTuple):
    """A product with packed weights, where an operation has several.

    Attributes:
      w: of logical shape [k, n].
      a_format: what its input is quantized to.
      bias: added to every row, or None.
    """

    w: BipolarArray
    a_format: BipolarFormat
    bias: Float[Array, " n"] | None


class Backend(Protocol):
    """Matrix products with a packed right operand of logical shape [k, n]; what is summed is integers."""

    def integer_matmul(
        self, codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat
    ) -> Int[Array, "m n groups"]:
        """sum over the k of each group of value(codes) * value(w), exact in int32."""

    def quantized_matmul(
        self,
        x: Float[Array, "m columns"],
        w: BipolarArray,
        a_format: BipolarFormat,
        bias: Float[Array, " n"] | None,
        prologue: Prologue | None = None,
        residual: Float[Array, "m out"] | None = None,
        activation: Activation | None = None,
    ) -> Float[Array, "m out"]:
        """Quantizes x as `activations.quantize_tokens`, multiplies integers, scales; output in x's dtype.

        Of k numbers a row, x has k, or as many as the prologue makes k of. The activation is of the product with its
        bias, in float32: it makes the output's columns of n. The residual is of x's dtype, too, and added to that.
        """

    def weight_only_matmul(
        self, x: Float[Array, "m k"], w: BipolarArray, bias: Float[Array, " n"] | None
    ) -> Float[Array, "m n"]:
        """x times the dequantized w, accumulated in float32; output in x's dtype."""

    def pack_weights(
        self,
        w: Float[Array, "k n"],
        half_steps: Float[Array, "n groups"],
        offset: Float[Array, "n groups"] | None,
        number_format: BipolarFormat,
        group_size: int | None,
    ) -> tuple[UInt32[Array, "planes n words"], Int[Array, "n groups"]]:
        """See `weights.pack_weights`: the same bits."""

    def plan_matmul(self, m: int, dtype: jnp.dtype, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
        """What the product of m rows of `dtype` with w would run; a_format None means float activations.

        Raises:
          Unsupported: as the product itself would.
        """

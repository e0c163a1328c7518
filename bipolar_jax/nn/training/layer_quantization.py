"""How one float layer is quantized, as its training left it."""

from __future__ import annotations

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.quantized_einsum import QuantizedEinsum, StatefulEinsum
from bipolar_jax.nn.training.stateful_dot_general import StatefulDotGeneral
from bipolar_jax.quantize import Precision


@dataclasses.dataclass(frozen=True)
class LayerQuantization:
    """The `DotGeneral` of a layer, and its step sizes if they are learned.

    Attributes:
      dot_general: how the operands are quantized, with weights="rhs".
      step_size: learned step sizes, or None for calibrated scales.

    Raises:
      ValueError: a `DotGeneral` with weights="lhs". Flax passes kernels as the right operand, so
        it would have quantized the kernel as activations.
    """

    dot_general: DotGeneral
    step_size: Float[Array, "*batch n numbers"] | None = None

    def __post_init__(self):
        if self.dot_general.weights != "rhs":
            raise ValueError(
                f"its DotGeneral has weights={self.dot_general.weights!r}, so that its kernel, the right operand, "
                'was trained as activations: train it with weights="rhs"'
            )

    @classmethod
    def of(cls, layer: nnx.Module) -> LayerQuantization | None:
        """The quantization that an NNX layer was trained with; None if it has no `DotGeneral`."""
        einsum = getattr(layer, "einsum_op", None)
        holder = einsum if isinstance(einsum, QuantizedEinsum | StatefulEinsum) else layer
        dot_general = getattr(holder, "dot_general", None)
        if getattr(layer, "dot_general_cls", None) is not None:
            dot_general = layer.dot_general_cls()
        if isinstance(dot_general, StatefulDotGeneral):
            step_size = None if dot_general.step_size is None else dot_general.step_size[...]
            return cls(dot_general.dot_general, step_size)
        return cls(dot_general) if isinstance(dot_general, DotGeneral) else None

    @classmethod
    def for_packing(cls, trained: LayerQuantization | None, precision: Precision | None) -> LayerQuantization:
        """The quantization to pack a layer with: that of its training, or else one of the given precision.

        Raises:
          ValueError: a precision that differs from that of training, or none for a layer that was not trained.
        """
        if trained is None:
            if precision is None:
                raise ValueError("the layer was not trained with DotGeneral: give a precision")
            return cls(DotGeneral.of(precision))
        if precision is not None and trained.dot_general.precision != precision:
            of_training = trained.dot_general.precision
            calibrations = ""
            if str(of_training) == str(precision):
                calibrations = f" with calibration {of_training.calibration!r}, not {precision.calibration!r}"
            raise ValueError(
                f"it was trained at {of_training}{calibrations}: pack it at that precision, or without rules"
            )
        return trained

    def on(self, implementation: str) -> LayerQuantization:
        """The same quantization on another backend; "auto" keeps the backend."""
        if implementation == "auto":
            return self
        dot_general = dataclasses.replace(self.dot_general, implementation=implementation)
        return dataclasses.replace(self, dot_general=dot_general)

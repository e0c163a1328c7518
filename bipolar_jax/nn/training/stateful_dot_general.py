"""A `DotGeneral` with state of its own, for NNX layers."""

from __future__ import annotations

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.training.dot_general import DotGeneral


class StatefulDotGeneral(nnx.Module):
    """A `DotGeneral` with learned step sizes, keys for quantized gradients, or both.

    One object serves one layer:

        dot_general = bj.DotGeneral(w_bits=2, a_bits=4)
        layer = nnx.Linear(256, 512, rngs=rngs)
        layer.dot_general = StatefulDotGeneral(dot_general, layer.kernel[...], learned_steps=True)

    `quantization_aware` does that for the layers of a model.

    Attributes:
      dot_general: the bits.
      step_size: `nnx.Param` [*batch, n, groups], trained with the weights (LSQ, arXiv
        1902.08153; see `quantize.learned_step`), or None for calibrated scales.
      rngs: the stream "gradient" of the given rngs, or None. Each call takes a key of it.
    """

    def __init__(
        self,
        dot_general: DotGeneral,
        kernel: Float[Array, "*batch k n"],
        *,
        learned_steps: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        """Step sizes begin as the paper has it, from the kernel.

        Raises:
          ValueError: gradient bits without rngs, rngs without gradient bits, or neither
            learned steps nor gradient bits, for which a `DotGeneral` is enough.
        """
        if (dot_general.gradient.bits is None) != (rngs is None):
            raise ValueError(
                f"gradient bits are {dot_general.gradient.bits} and rngs {'are' if rngs else 'are not'} given: "
                "quantized gradients take both, others neither"
            )
        if not learned_steps and rngs is None:
            raise ValueError("neither learned steps nor gradient bits: a DotGeneral by itself does that")
        self.dot_general = dot_general
        self.step_size = nnx.Param(dot_general.initial_step_size(kernel)) if learned_steps else nnx.data(None)
        self.rngs = nnx.data(None) if rngs is None else rngs["gradient"].fork()

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
        """As `DotGeneral`."""
        return self.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
            step_size=None if self.step_size is None else self.step_size[...],
            key=None if self.rngs is None else self.rngs(),
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a layer is trained with: the bits, and its step sizes if they are learned.

    Raises:
      ValueError: a `DotGeneral` that takes the left operand for the weights; Flax passes kernels as the right one.
    """

    dot_general: DotGeneral
    step_size: Float[Array, "*batch n groups"] | None = None

    def __post_init__(self):
        if self.dot_general.weights != "rhs":
            raise ValueError(
                f"its DotGeneral has weights={self.dot_general.weights!r}, so that its kernel, the right operand, "
                'was trained as activations: train it with weights="rhs"'
            )

    @classmethod
    def of(cls, layer: nnx.Module) -> Trained | None:
        """None for layers in float."""
        found = getattr(layer, "dot_general", None)
        if getattr(layer, "dot_general_cls", None) is not None:
            found = layer.dot_general_cls()
        if isinstance(found, StatefulDotGeneral):
            return cls(found.dot_general, None if found.step_size is None else found.step_size[...])
        return cls(found) if isinstance(found, DotGeneral) else None

    def on(self, implementation: str) -> Trained:
        """The same on another backend; "auto" leaves it."""
        if implementation == "auto":
            return self
        return dataclasses.replace(
            self, dot_general=dataclasses.replace(self.dot_general, implementation=implementation)
        )

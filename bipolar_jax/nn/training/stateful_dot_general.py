"""A `DotGeneral` with learned step sizes and PRNG keys, for NNX layers."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.training.dot_general import DotGeneral


class StatefulDotGeneral(nnx.Module):
    """A `DotGeneral` with learned step sizes, PRNG keys for quantized gradients, or both.

    Each layer needs an object of its own:

        dot_general = bj.DotGeneral(w_bits=2, a_bits=4)
        layer = nnx.Linear(256, 512, rngs=rngs)
        layer.dot_general = nnx.data(StatefulDotGeneral(dot_general, layer.kernel[...], learned_steps=True))

    `quantization_aware` does this for the layers of a model.

    Attributes:
      dot_general: how the operands are quantized.
      step_size: `nnx.Param` [*batch, n, numbers], trained with the weights (LSQ, arXiv
        1902.08153; see `DotGeneral.initial_step_size`), or None for calibrated scales.
      rngs: a fork of the stream "gradient" of the given rngs, or None. Each call draws a key.
    """

    def __init__(
        self,
        dot_general: DotGeneral,
        kernel: Float[Array, "*batch k n"],
        *,
        learned_steps: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        """Initializes the step sizes from the kernel, as in the paper.

        Args:
          dot_general: how the operands are quantized.
          kernel: the layer's kernel, with the contracted axes merged into k.
          learned_steps: True for learned step sizes, False for calibrated scales.
          rngs: required if `dot_general.gradient.bits` is set, None otherwise.

        Raises:
          ValueError: gradient bits without rngs, rngs without gradient bits, or neither
            learned steps nor gradient bits.
        """
        if (dot_general.gradient.bits is None) != (rngs is None):
            raise ValueError(
                f"gradient bits are {dot_general.gradient.bits} and rngs {'are' if rngs else 'are not'} given: "
                "give both for quantized gradients, and neither otherwise"
            )
        if not learned_steps and rngs is None:
            raise ValueError("neither learned steps nor gradient bits are asked for: use the DotGeneral itself")
        self.dot_general = dot_general
        self.step_size = nnx.Param(dot_general.initial_step_size(kernel)) if learned_steps else nnx.data(None)
        self.rngs = nnx.data(None) if rngs is None else rngs["gradient"].fork()

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
        """Multiplies as `DotGeneral` does, with this object's step sizes and a new key."""
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

"""A `DotGeneral` with learned step sizes and PRNG keys, for linen layers."""

from __future__ import annotations

from flax import linen

from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.ops.contraction import Contraction


class LinenDotGeneral(linen.Module):
    """A `DotGeneral` with learned step sizes, PRNG keys for quantized gradients, or both; a `dot_general_cls`.

        linen.Dense(512, dot_general_cls=functools.partial(LinenDotGeneral, bj.DotGeneral(2, 4), learned_steps=True))

    Step sizes are the parameter "step_size" [*batch, n, numbers] of this module (LSQ, arXiv
    1902.08153; see `DotGeneral.initial_step_size`). For quantized gradients every call draws a key from
    the stream "gradient": `model.apply(variables, x, rngs={"gradient": key})`.

    Attributes:
      dot_general: how the operands are quantized.
      learned_steps: True for learned step sizes, False for calibrated scales.
    """

    dot_general: DotGeneral
    learned_steps: bool = False

    @linen.compact
    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        """Multiplies as `DotGeneral` does, with this module's step sizes and a new key."""
        step_size = key = None
        if self.learned_steps:
            kernel = Contraction.of(lhs.shape, rhs.shape, dimension_numbers).fold_w(rhs)
            step_size = self.param("step_size", lambda _: self.dot_general.initial_step_size(kernel))
        if self.dot_general.gradient.bits is not None:
            # Initialization computes no gradient, so any key will do.
            key = self.make_rng("params" if self.is_initializing() else "gradient")
        return self.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, step_size=step_size, key=key
        )

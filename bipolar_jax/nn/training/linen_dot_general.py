"""A `DotGeneral` with state of its own, for linen layers."""

from __future__ import annotations

from flax import linen

from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.ops.contraction import Contraction


class LinenDotGeneral(linen.Module):
    """A `DotGeneral` with learned step sizes, keys for quantized gradients, or both, as `dot_general_cls`.

        linen.Dense(512, dot_general_cls=functools.partial(LinenDotGeneral, bj.DotGeneral(2, 4), learned_steps=True))

    Step sizes are the parameter "step_size" [*batch, n, groups] of this module (LSQ, arXiv
    1902.08153; see `quantize.learned_step`). Quantized gradients take a key from the stream
    "gradient" in every call: `model.apply(variables, x, rngs={"gradient": key})`.

    Attributes:
      dot_general: the bits.
      learned_steps: whether step sizes are learned; else scales are calibrated.
    """

    dot_general: DotGeneral
    learned_steps: bool = False

    @linen.compact
    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        """As `DotGeneral`."""
        step_size = key = None
        if self.learned_steps:
            kernel = Contraction.of(lhs.shape, rhs.shape, dimension_numbers).fold_w(rhs)
            step_size = self.param("step_size", lambda _: self.dot_general.initial_step_size(kernel))
        if self.dot_general.gradient.bits is not None:
            # Initialization has no gradient; any key does for it.
            key = self.make_rng("params" if self.is_initializing() else "gradient")
        return self.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, step_size=step_size, key=key
        )

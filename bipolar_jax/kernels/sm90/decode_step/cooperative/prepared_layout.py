"""How prepared weights are laid out, as far as the kernel of all layers has to know."""

from __future__ import annotations

import dataclasses

from bipolar_jax.packing.fields import TokenOrder
from bipolar_jax.packing.float_terms import FloatTerms, terms_shape


@dataclasses.dataclass(frozen=True)
class PreparedLayout:
    """What is static about prepared weights (`packing.fields`) besides their format.

    Attributes:
      chunks: chunks of a stage with terms of their own; 0 without groups.
      order: the order of tokens that positions of a stage follow.
      float_terms: the form of float scales of groups; None if there are none.
    """

    chunks: int
    order: TokenOrder
    float_terms: FloatTerms | None = None

    @property
    def terms_shape(self) -> tuple[int, int]:
        """Vectors of the terms of a stage and part, and words of each."""
        return terms_shape(self.float_terms, self.chunks)

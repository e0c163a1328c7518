"""What the product loads from memory, arranged as it is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.core.hardware import TMA_ALIGNMENT


class Sources(NamedTuple):
    """What is loaded, refs in memory: by the producer, and what follows the terms by the consumers.

    Attributes:
      operands: x's words and w's.
      group_terms: of every group, or None.
      terms: of tokens and of columns, see `terms_of_parts`.
      residual: or None.
      heads: the fields of `HeadTargets` that are no outputs, or None.
    """

    operands: tuple[Any, Any]
    group_terms: Any
    terms: tuple[TokenTerms, ColumnTerms]
    residual: Any = None
    heads: Any = None


def terms_of_parts(terms: TokenTerms | ColumnTerms, parts: int) -> TokenTerms | ColumnTerms:
    """Vectors as [parts, size of a part], as they are loaded.

    Rows are whole 16 bytes, which vectors are too once they are mapped over. Each part begins one: an H200 refused a
    copy from the middle of 16 bytes as an illegal instruction.
    """
    return aligned(jax.tree.map(lambda term: term.reshape(parts, -1), terms))


def aligned(terms):
    """Rows of whole 16 bytes."""
    return jax.tree.map(lambda term: fill_up(term, TMA_ALIGNMENT // term.dtype.itemsize), terms)

"""What a model says of itself so that `bipolar_jax.compress` can rotate it and calibrate it block by block.

`models.Transformer` implements it for every architecture; any other NNX model can. What always holds:

- `for i in range(num_blocks): carry = run_block(block(i), carry)`, from `enter_blocks(ids)` on, leads to the residual
  stream that the model itself has before its last norm.
- `with_blocks([block(i) for i in range(num_blocks)])` is the model itself.
- The layers of a `Sites` have the same input, and `block_sites` are in the order in which the layers run.
- A block adds to the residual stream what its `to_stream` sites put out, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sites:
    """Linear layers of a block that share one input.

    Attributes:
      names: paths of the layers within a block, joined by "/", such as "attention/q_proj".
      to_stream: whether the output is added to the residual stream.
    """

    names: tuple[str, ...]
    to_stream: bool


@runtime_checkable
class Compressible(Protocol):
    """A model whose residual stream passes through blocks of equal structure.

    Attributes:
      block_sites: linear layers of a block, the same for every block.
      num_blocks: number of blocks.
    """

    @property
    def block_sites(self) -> tuple[Sites, ...]: ...

    @property
    def num_blocks(self) -> int: ...

    def block(self, index: int) -> nnx.Module:
        """A block by itself, with float or packed layers; its arrays are copies of the model's."""

    def with_blocks(self, blocks: Sequence[nnx.Module]) -> Self:
        """A new model with these blocks, whose layers may be packed; everything else is shared with this model.

        Raises:
          ValueError: another number of blocks, or blocks that differ in structure.
        """

    def enter_blocks(self, ids: Int[Array, "batch length"]) -> Any:
        """The carry of the first block: a pytree of the residual stream and of what all blocks need, such as tables."""

    def run_block(self, block: nnx.Module, carry: Any) -> Any:
        """The carry of the next block; for `jax.jit` one program serves all blocks of equal structure."""

    def stream(self, carry: Any) -> Float[Array, "batch length hidden"]:
        """The residual stream in a carry."""


def layer_at(module: nnx.Module, path: str) -> nnx.Module:
    """The submodule at a path such as "attention/q_proj".

    Raises:
      ValueError: no such submodule.
    """
    for name in path.split("/"):
        if not hasattr(module, name):
            raise ValueError(f"{type(module).__name__} has no {name!r}, of the path {path!r}")
        module = getattr(module, name)
    return module

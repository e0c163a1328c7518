"""What an output has to offer: it takes the finished numbers of a product from registers to memory.

The product multiplies, and finishes each number: correction, scales, bias, activation, cast. An output does everything
after that: it may add to the numbers, reorder or pack them, and it stores them. The caller hands an output to
`launch.launch`, which imports none of them.

- `dense.py`: a matrix [m, n], with an optional residual. Staged through shared memory, stored by TMA.
- `heads.py`: queries, keys and values of prompts, rotated, also in the cache. Staged through shared memory.
  `gemm_expanded/heads.py` has the same for accumulators whose columns are tokens.
- `signs.py`: one-bit tokens of the next product. Packed in registers, stored by the threads.

To add an output:

1. Copy `dense.py` (staged) or `signs.py` (from registers), and rewrite its two classes: the `Output`, which the caller
   builds, and its `Writer`, which runs in the kernel.
2. Call `launch` with it in a file of `projections/`, or in `api.py` if any caller may want it.
3. Test it in `tests/kernels/sm90/gemm` like the others: interpreted with the race detector, and compiled for every
   tiling of `backend.planning.CANDIDATES` without spills; an output shares the registers with the accumulator.

The consumer calls an output like this:

    writer = output.writer(...)
    writer.start()
    for origin in tiles_of_this_consumer:
        writer.preload(origin)
        sums = mainloop(...)
        writer.store(origin, finished)  # finished(row, column) finishes a chunk of the sums

Rows and columns in `finish_shape` and `finished` are those of the accumulator. `Output.token_axis` says which of them
are tokens; `TileOrigin` names tokens and columns of the output instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bipolar_jax.kernels.sm90.gemm.problem import Problem, TileOrigin

# finished(row, column) finishes the sums that begin at that row and column of the accumulator, both Python integers. It
# returns an array of `Writer.finish_shape`, of the output's dtype, in the layout WGMMA; of fewer columns where an
# accumulator of `gemm_expanded` ends. It computes at every call: call it once for each chunk.
Finish = Callable[[int, int], jax.Array]


@runtime_checkable
class Output(Protocol):
    """What becomes of finished numbers: a pytree, whose leaves are the arrays in memory that it reads or updates.

    The caller builds it with arrays (or `jax.new_ref`s). In the kernel the leaves are refs of them.

    Attributes:
      token_axis: the axis of the accumulator that holds tokens: 0 where activations are the M operand of wgmma, 1
        where weights are. `launch` refuses an output of the other axis.
      dtype: of the finished numbers that it takes.
      name_endings: added to the kernel's name.
    """

    token_axis: Literal[0, 1]
    dtype: jnp.dtype
    name_endings: tuple[str, ...]

    def out_types(self, problem: Problem) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that the kernel writes."""
        ...

    def scratch(self, problem: Problem, staging_slots: int) -> dict[str, Any]:
        """Specifications of its shared memory and barriers, for all consumers of a block.

        Args:
          problem: the product.
          staging_slots: chunks of 64 rows of 128 bytes that fit shared memory, for each consumer.

        Returns:
          specifications by name; names must differ from the fields of `smem.Scratch`.

        Raises:
          ValueError: it needs more.
        """
        ...

    def writer(
        self, problem: Problem, targets: tuple[Any, ...], scratch: dict[str, Any], consumer: jax.Array
    ) -> Writer:
        """The writer of one consumer warpgroup, within the kernel.

        Args:
          problem: the product.
          targets: refs of the arrays of `out_types`.
          scratch: refs of what `scratch` specified.
          consumer: index of the warpgroup among the block's consumers.
        """
        ...


@runtime_checkable
class Writer(Protocol):
    """The output of one consumer warpgroup; all of its threads call.

    Attributes:
      finish_shape: rows and columns of the accumulator that are finished at once. Terms of columns are read once for
        all rows finished together; but all numbers finished together are in registers, beside the accumulator.
    """

    finish_shape: tuple[int, int]

    def start(self) -> None:
        """Runs once, before the first tile."""
        ...

    def preload(self, origin: TileOrigin) -> None:
        """Starts the loads that `store` needs of memory: they arrive under the mainloop.

        Staging that is loaded to may still be read by the stores of the tile before: wait for those first.
        """
        ...

    def store(self, origin: TileOrigin, finished: Finish) -> None:
        """Finishes and stores a tile. Stores may still be in flight when it returns.

        Numbers beyond the problem's m and n are meaningless, and must not be stored. After the last call of `finished`
        the threads must meet at a barrier, such as `commit_smem`: the producer overwrites the terms that it reads.
        """
        ...

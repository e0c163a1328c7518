"""The weights of the product that follows, prefetched into the L2 cache while rows are quantized.

Few rows are quantized in the time of a launch and of one read, in which memory would idle, and so would it while the
next kernel starts. The prefetch is a hint: nothing waits for it, and no number depends on it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, UInt32

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.packing import PreparedArray

# By count 3.5 us from the prefetch to the first loads of the next kernel, at 4 TB/s; a third of the L2 cache.
_MOST_BYTES = 14 * 10**6


@dataclasses.dataclass(frozen=True)
class Runs:
    """The bytes of an array that are prefetched: the first of every run.

    Attributes:
      parts: of the array, of equal size.
      splits: runs of a part, which begin `run_bytes` apart.
      part_bytes, run_bytes, first_bytes: of a part, of a run, and of what is prefetched of a run: multiples of 16.
    """

    parts: int
    splits: int
    part_bytes: int
    run_bytes: int
    first_bytes: int

    @property
    def count(self) -> int:
        """Runs of the array."""
        return self.parts * self.splits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightsAhead:
    """What the next kernel reads first.

    Attributes:
      arrays: prepared words of weights, and the terms of their groups.
      runs: of each array.
    """

    arrays: list[UInt32[Array, "tiles parts stages *rest"]]
    runs: tuple[Runs, ...] = dataclasses.field(metadata={"static": True})


def weights_ahead(w: PreparedArray, splits: int = 1) -> WeightsAhead:
    """The stages that a product begins with, of all parts of the weights; all stages if they are few bytes.

    Args:
      w: [k, n].
      splits: of K, which the product reads at a time.
    """
    arrays = [w.words] if w.terms is None else [w.words, w.terms]
    stages = w.words.shape[2]
    of_split = -(-stages // splits)
    parts = w.words.shape[0] * w.words.shape[1]
    stage_bytes = [array.nbytes // (parts * stages) for array in arrays]
    # The last split may have fewer stages.
    first = min(stages - (splits - 1) * of_split, max(1, _MOST_BYTES // (parts * splits * sum(stage_bytes))))
    runs = (Runs(parts, splits, stages * size, of_split * size, max(0, first) * size) for size in stage_bytes)
    return WeightsAhead(arrays, tuple(runs))


def prefetch(runs: tuple[Runs, ...], refs: list[Any], worker: Int[Array, ""], workers: int) -> None:
    """Prefetches this warpgroup's share of all runs.

    Args:
      runs: of each array.
      refs: the arrays in global memory.
      worker: index of the warpgroup among the `workers` of all blocks.
    """
    for own, ref in zip(runs, refs, strict=True):
        if own.first_bytes:

            @pl.loop(0, lax.div(own.count - worker + workers - 1, workers))
            def _(turn, own=own, ref=ref):
                _prefetch_run(own, ref, worker + turn * workers)


@with_twin(lambda runs, ref, index: None)
def _prefetch_run(runs: Runs, ref: Any, index: Int[Array, ""]) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, ref, index):
        prefetch_run(runs, ref, scalar_of(index))

    inline(ref, index)


def prefetch_run(runs: Runs, array: Value, index: Value) -> None:
    """Prefetches a run of an array in global memory, from one thread of the warpgroup; see `_prefetch_run`."""
    part = ptx.divided(index, runs.splits)
    split = ptx.plus(index, ptx.times(part, -runs.splits))
    start = ptx.advance_far(ptx.pointer(array, ptx.GLOBAL), part, runs.part_bytes)
    with ptx.when(ptx.equal(thread_index(), 0)):
        ptx.prefetch_bulk(ptx.advance_far(start, split, runs.run_bytes), runs.first_bytes)

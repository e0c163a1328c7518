"""Matrix product of packed operands on Hopper's tensor cores: the kernel and its launch.

A persistent kernel: one block a multiprocessor, each with one producer and two consumer warpgroups.

- The producer (`producer.py`) loads tiles of both operands by TMA into a ring buffer, and runs ahead across output
  tiles.
- The consumers (`consumer.py`) multiply and finish tiles independently: while one is in its epilogue, the other and the
  loads go on. Sums stay in registers until they are finished numbers.
- An output (`outputs/protocol.py`), handed in by the caller, takes the finished numbers to memory. `api.py` has the
  product as a matrix; `projections/` has others.

`problem.py` says which tiles there are and in which order, `smem.py` what is in shared memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.gemm.config import CONSUMER_REGISTERS, CONSUMERS, PRODUCER_REGISTERS
from bipolar_jax.kernels.sm90.gemm.consumer import consume
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.kernels.sm90.gemm.producer import arrange, produce
from bipolar_jax.kernels.sm90.gemm.smem import Scratch, scratch_types


def launch(
    problem: Problem,
    operands: tuple[jax.Array, jax.Array],
    tokens: TokenTerms,
    columns: ColumnTerms,
    output: Output,
    *,
    group_terms: GroupTerms | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> list[jax.Array]:
    """Runs the kernel.

    Args:
      problem: sizes and order.
      operands: rows of x and of w, uint32 [planes, rows, words], see `api.packed_matmul`.
      tokens: terms of tokens, vectors over sequences * m.
      columns: terms of columns, vectors over factors * n.
      output: what becomes of finished numbers.
      group_terms: terms of groups, if the problem has a group size.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      the arrays that `output.out_types` names.

    Raises:
      ValueError: tokens along another axis than the output's; what does not fit shared memory or registers.
    """
    if output.token_axis != problem.token_axis:
        raise ValueError(
            f"tokens are axis {problem.token_axis} of the accumulator, but {type(output).__name__} takes them "
            f"along axis {output.token_axis}"
        )
    sources = arrange(problem, operands, tokens, columns, group_terms)
    arrays, tree = jax.tree.flatten((sources, output))
    return launch_kernel(
        functools.partial(_kernel, problem, tree),
        out_type=output.out_types(problem),
        grid=(problem.clusters,),
        grid_names=("cluster",),
        cluster=(problem.tiling.cluster_m, problem.tiling.cluster_n),
        cluster_names=("cluster_m", "cluster_n"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types(problem, sources, output),
        # No automatic barriers: every write of shared memory, by threads or TMA, follows a barrier of our own behind
        # the reads of what it overwrites.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=problem.activation is not None,
        ),
        kernel_name=_name(problem, output),
        interpret=interpret,
    )(*arrays)


def _name(problem: Problem, output: Output) -> str:
    """As profilers show it."""
    activation = [] if problem.activation is None else ["activation"]
    return "_".join(["packed_matmul", *activation, *output.name_endings])


def _kernel(problem: Problem, tree: Any, *refs: Any, **scratch: Any) -> None:
    sources, output = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    targets = refs[tree.num_leaves :]
    shared = Scratch(**{name: scratch.pop(name) for name in Scratch._fields})
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce(problem, sources, shared)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume(problem, output, targets, shared, scratch)

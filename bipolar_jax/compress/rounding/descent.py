"""Coordinate descent on the codes of all inputs, and on the grids of all groups: the loss falls with every step.

The loss of a row is (w - q) H (w - q)^T. With r = H (w - q), one input's best number, all others fixed, is
q[i] + r[i] / H[i, i] (QuantEase, arXiv 2309.01885, lemma 1), and one group's best grid solves two equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.compress.rounding.affine_grid import AffineGrid, NestedGrid
from bipolar_jax.compress.rounding.sweep import HIGHEST, round_in_turn


def loss_of_rows(
    rows: Float[Array, "k n"], numbers: Float[Array, "k n"], hessian: Float[Array, "k k"]
) -> Float[Array, "n"]:
    """(w - q) H (w - q)^T of every row."""
    error = rows - numbers
    return jnp.sum(error * jnp.matmul(hessian, error, precision=HIGHEST), axis=0)


def descend(
    rows: Float[Array, "k *precisions n"],
    codes: UInt8[Array, "k n"],
    hessian: Float[Array, "k k"],
    grid: AffineGrid | NestedGrid,
    groups: Int[Array, "k"],
    block: int,
) -> UInt8[Array, "k n"]:
    """One pass over all inputs: each code becomes the best one for the others as they are then.

    Args:
      rows: the weights, inputs first; for a nested grid once for each precision.
      codes: where to begin.
      hessian: of positive diagonal, see `with_damping`.
      grid, groups, block: as for `round_in_turn`.

    Returns:
      The codes.
    """
    numbers = grid.of(groups).numbers(codes)
    per_diagonal = (1 / jnp.diagonal(hessian))[:, None]
    steps = jnp.tensordot(per_diagonal * hessian, rows - numbers, 1, precision=HIGHEST)
    return round_in_turn(numbers + steps, numbers, per_diagonal * hessian, grid, groups, block)


class GroupSums(NamedTuple):
    """What the loss of a group's change a (u - mean) + e is made of: a (a curvature - 2 pull) + e (e weight - 2 shift).

    u are the group's codes, and mean the number for which a and e do not mix; all sums run over the group's part of H.

    Attributes:
      mean: 1 H u / 1 H 1.
      curvature: (u - mean) H (u - mean).
      weight: 1 H 1.
      pull: (u - mean) r, with r = H (w - q).
      shift: 1 r.
    """

    mean: Float[Array, "n"]
    curvature: Float[Array, "n"]
    weight: Float[Array, ""]
    pull: Float[Array, "n"]
    shift: Float[Array, "n"]


# (index of the group, its sums) to what is added to its step and to its base.
Change = Callable[[Int[Array, ""], GroupSums], tuple[Float[Array, "n"], Float[Array, "n"]]]


def change_grids(
    rows: Float[Array, "k n"],
    codes: UInt8[Array, "k n"],
    hessian: Float[Array, "k k"],
    grid: AffineGrid,
    size: int,
    change: Change,
) -> tuple[Float[Array, "groups n"], Float[Array, "groups n"]]:
    """One pass over the groups, whose grids change while the codes stay; each sees what those before it have done.

    Args:
      rows, codes, hessian: as for `descend`.
      grid: of every group.
      size: inputs of a group; the last one may have fewer.
      change: what a group does.

    Returns:
      What all groups have added to steps and to bases.
    """
    k = len(rows)
    num_groups = len(grid.step)
    pad = num_groups * size - k
    numbers = grid.of(jnp.arange(k) // size).numbers(codes)
    pull = jnp.matmul(hessian, rows - numbers, precision=HIGHEST)
    # Inputs that pad the last group have no curvature and no pull, so their codes do not matter.
    pull, codes = (jnp.pad(a, ((0, pad), (0, 0))) for a in (pull, codes))
    hessian = jnp.pad(hessian, ((0, pad), (0, pad)))

    def change_group(pull, index):
        first = index * size
        own_codes, own_pull = (jax.lax.dynamic_slice_in_dim(a, first, size) for a in (codes, pull))
        columns = jax.lax.dynamic_slice_in_dim(hessian, first, size, axis=1)
        own_hessian = jax.lax.dynamic_slice_in_dim(columns, first, size)
        u = own_codes.astype(jnp.float32)
        sums = jnp.sum(own_hessian, axis=0)[:, None]
        weight = jnp.sum(sums)
        mean = jnp.sum(sums * u, axis=0) / weight
        centered = u - mean[None]
        curvature = jnp.sum(centered * jnp.matmul(own_hessian, centered, precision=HIGHEST), axis=0)
        shift = jnp.sum(own_pull, axis=0)
        group = GroupSums(mean, curvature, weight, jnp.sum(centered * own_pull, axis=0), shift)
        to_step, to_base = change(index, group)
        moved = to_step[None] * u + to_base[None]
        return pull - jnp.matmul(columns, moved, precision=HIGHEST), (to_step, to_base)

    return jax.lax.scan(change_group, pull, jnp.arange(num_groups))[1]

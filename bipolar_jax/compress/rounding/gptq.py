"""GPTQ, by one Cholesky factorization of the Hessian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from bipolar_jax.compress.rounding.affine_grid import AffineGrid, NestedGrid
from bipolar_jax.compress.rounding.sweep import round_in_turn

# Below this part of the mean diagonal a Hessian that was summed in float32 is noise.
LEAST_DAMPING = 1e-6
_MORE_DAMPING = 10.0


def with_damping(hessian: Float[Array, "k k"], damping: float | Float[Array, ""]) -> Float[Array, "k k"]:
    """The Hessian with `damping` added to its diagonal, of mean 1; ten times as much until it has a Cholesky factor.

    Inputs that were never active, of diagonal 0, are then rounded to the nearest, and the others as without them.
    """
    eye = jnp.eye(len(hessian), dtype=jnp.float32)

    def fails(damping) -> Bool[Array, ""]:
        # With half of the damping, because GPTQ factorizes in another order, which rounds differently.
        return ~jnp.all(jnp.isfinite(jnp.linalg.cholesky(hessian + damping / 2 * eye)))

    start = jnp.maximum(jnp.float32(damping), LEAST_DAMPING)
    return hessian + eye * jax.lax.while_loop(lambda d: fails(d) & (d < 1), lambda d: d * _MORE_DAMPING, start)


def gptq(
    rows: Float[Array, "k *precisions n"],
    hessian: Float[Array, "k k"],
    grid: AffineGrid | NestedGrid,
    groups: Int[Array, "k"],
    *,
    act_order: bool,
    block: int,
) -> UInt8[Array, "k n"]:
    """Rounds inputs in turn, the error of each spread over those after it (Frantar et al. 2022, arXiv 2210.17323).

    The paper's updates come from the Cholesky factor of the inverse Hessian. Here H = M D M^T, M upper triangular with
    ones on its diagonal: the loss (w - q) H (w - q)^T is the sum of D[t] ((w - q) M)[t]^2, and column t of M has only
    inputs up to t. So q[t] is what comes nearest to w[t] + sum_{i < t} (w - q)[i] M[i, t], which is the same number
    (QuIP, arXiv 2307.13304, theorem 6), and nothing is inverted: one Cholesky factorization, of the Hessian in
    reversed order, is backward stable in float32 for all that `with_damping` lets pass.

    Args:
      rows: the weights, inputs first; for a nested grid once for each precision.
      hessian: positive definite and symmetric, see `with_damping`.
      grid, groups: static, that is known before.
      act_order: inputs of large diagonals first.
      block: see `round_in_turn`.

    Returns:
      The codes.
    """
    order = jnp.argsort(-jnp.diagonal(hessian)) if act_order else jnp.arange(len(hessian))
    targets = rows[order]
    coupling = feedback(hessian[order][:, order])
    codes = round_in_turn(targets, targets, coupling, grid, groups[order], block)
    return codes[jnp.argsort(order)]


def feedback(hessian: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """M^T of H = M D M^T, lower triangular with ones on the diagonal."""
    factor = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return (factor / jnp.diagonal(factor)[None]).T

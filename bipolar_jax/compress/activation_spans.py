"""How much of a token's range its grid should span, found for each input of a block on a text.

With few bits a smaller span, which clips the largest numbers of a token, lowers the error of all others more than it
costs. The best part of the range is found as in ACIQ (arXiv 1810.05723) and OCTAV (arXiv 2206.06501), but by a search
over the error that matters, that of the layers' outputs: sum over tokens of |(x^ - x) W|^2. Where outputs are added to
the residual stream a token counts 1 / mean square of the sum, which a norm divides by: a few tokens have outputs a
thousand times as large as all others', and lose little where these are clipped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.block_programs import enter_blocks, run_block
from bipolar_jax.compress.expert_moments import row_weights
from bipolar_jax.compress.hessians import dequantized_tokens, stream_weights
from bipolar_jax.compress.packed_sites import SitePlan, float_matrix
from bipolar_jax.compress.site_inputs import ExpertInputs, site_inputs
from bipolar_jax.format import BipolarFormat
from bipolar_jax.nn.compressible import Compressible, Sites, layer_at, without_signs

SPANS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)


def with_learned_spans(
    model: Compressible, batches: Sequence[Any], plans: Sequence[tuple[SitePlan, ...]], most_bits: int
) -> tuple[tuple[SitePlan, ...], ...]:
    """The plans, with the best of `SPANS` in precisions of few activation bits that have no span yet.

    All blocks of a site share a span, because layers of a stack share a precision: it is the one with the least sum
    over blocks of relative errors. The model is the float one: spans hardly depend on how weights are rounded.

    Args:
      model: whose blocks are not packed yet.
      batches: of its inputs.
      plans: of every block.
      most_bits: precisions of more activation bits keep their span.
    """

    def searched(precision) -> bool:
        return precision.a_bits is not None and precision.a_bits <= most_bits and precision.a_span == 1

    if not any(map(searched, (each for plan in plans for sites in plan for each in sites.precisions.values()))):
        return tuple(plans)
    sums: dict[tuple[int, BipolarFormat], np.ndarray] = defaultdict(lambda: np.zeros(len(SPANS)))
    model, signs = without_signs(model)
    carries = [enter_blocks(model, batch, None, signs) for batch in batches]
    for block_index, plan in enumerate(plans):
        block = model.block(block_index)
        for index, sites in enumerate(plan):
            names = tuple(name for name, precision in sites.precisions.items() if searched(precision))
            remaining = tuple(each.sites for each in plan[index:])
            for a_format in dict.fromkeys(sites.precisions[name].a_format for name in names):
                alike = tuple(name for name in names if sites.precisions[name].a_format == a_format)
                errors = sum(np.asarray(_errors(model, block, carry, remaining, alike, a_format)) for carry in carries)
                sums[index, a_format] += errors / max(errors[0], np.finfo(np.float32).tiny)
        if block_index + 1 < len(plans):
            carries = [run_block(model, block, carry) for carry in carries]
    best = {key: SPANS[int(np.argmin(errors))] for key, errors in sums.items()}

    def with_span(index: int, precision):
        return (
            dataclasses.replace(precision, a_span=best[index, precision.a_format]) if searched(precision) else precision
        )

    return tuple(
        tuple(
            dataclasses.replace(
                sites, precisions={name: with_span(index, each) for name, each in sites.precisions.items()}
            )
            for index, sites in enumerate(plan)
        )
        for plan in plans
    )


def output_errors(
    x: Float[Array, "m k"], weights: Float[Array, " m"], w: Float[Array, "k n"], a_format: BipolarFormat
) -> Float[Array, " spans"]:
    """The squared error of x @ w that quantizing x makes, summed over weighted tokens, for each of `SPANS`.

    Args:
      x: float32 tokens.
      weights: of the tokens.
      w: float32 weights.
      a_format: of the tokens, whose span is replaced.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    k, n = w.shape
    gram = None if n <= k else product(w, w.T)
    errors = []
    for span in SPANS:
        difference = dequantized_tokens(x, dataclasses.replace(a_format, span=span)) - x
        if gram is None:
            by_token = jnp.sum(product(difference, w) ** 2, axis=-1)
        else:
            by_token = jnp.sum(product(difference, gram) * difference, axis=-1)
        errors.append(jnp.sum(by_token * weights))
    return jnp.stack(errors)


@functools.partial(jax.jit, static_argnames=("remaining", "names", "a_format"))
def _errors(
    model: Compressible,
    block: nnx.Module,
    carry: Any,
    remaining: tuple[Sites, ...],
    names: tuple[str, ...],
    a_format: BipolarFormat,
) -> Float[Array, " spans"]:
    """`output_errors` of the layers of these names, which are among the first of the remaining sites."""
    x, stream = site_inputs(model, block, carry, remaining)
    w = jnp.concatenate([float_matrix(layer_at(block, name)).astype(jnp.float32) for name in names], axis=-1)
    if remaining[0].experts:
        return _errors_of_experts(x, w, stream if remaining[0].adds_to_stream else None, a_format)
    rows = x.reshape(-1, len(w)).astype(jnp.float32)
    weights = jnp.ones(len(rows), jnp.float32)
    if remaining[0].adds_to_stream:
        stream = stream.reshape(-1, stream.shape[-1]).astype(jnp.float32)
        added = jnp.matmul(rows, w) if w.shape[1] == stream.shape[1] else 0
        weights = stream_weights(stream + added)
    return output_errors(rows, weights, w, a_format)


def _errors_of_experts(
    inputs: ExpertInputs, w: Float[Array, "experts k n"], stream: Float[Array, "..."] | None, a_format: BipolarFormat
) -> Float[Array, " spans"]:
    """`output_errors` of all experts, each of the tokens that reach it."""
    of_tokens = None if stream is None else stream_weights(stream.reshape(-1, stream.shape[-1]))

    def step(errors, block):
        rows, weights, expert = block
        own = jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
        return errors + output_errors(rows.astype(jnp.float32), weights, own, a_format), None

    blocks = (inputs.rows, row_weights(inputs, of_tokens), inputs.blocks.experts)
    return jax.lax.scan(step, jnp.zeros(len(SPANS), jnp.float32), blocks)[0]

"""A decode step of a few sequences whose layers run as one kernel, where a backend has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax import ops
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.alibi import alibi_slopes
from bipolar_jax.models.blocks.feed_forward import gate_activation
from bipolar_jax.models.blocks.norm import as_prologue
from bipolar_jax.models.blocks.rope import rotate
from bipolar_jax.models.blocks.scoring import Scoring
from bipolar_jax.models.blocks.step import Step, shared_implementation
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.nn import Linear, fuses
from bipolar_jax.ops import Activation, Prologue

# Sequences that one kernel decodes unless a model says otherwise (`prepare_for_inference`): what Hopper's serves, see
# `kernels/sm90/decode_step/README.md`.
MOST_SEQUENCES = 4


def fused_layers(
    layers: nnx.Module,
    config: TransformerConfig,
    hidden: Float[Array, "batch 1 hidden"],
    tables: tuple[Float[Array, "batch 1 half"], Float[Array, "batch 1 half"]] | None,
    cache: KVCache,
    first_layer: int = 0,
    *,
    most_sequences: int = MOST_SEQUENCES,
) -> tuple[Float[Array, "batch 1 hidden"], KVCache]:
    """All layers of a stack for one new token of each sequence, by `ops.decode_layers`.

    The numbers are those of the layers one after the other up to rounding: between products they stay float32 here,
    where layers round them to the model's dtype.

    Args:
      layers: the stack of `transformer.DecoderLayer`.
      config: of the model.
      hidden: of the new tokens.
      tables: cosines and sines of their positions, where positions are rotary.
      cache: of all layers of the model; its lengths are the tokens' positions.
      first_layer: index of the stack's first layer in the model.
      most_sequences: more are refused.

    Returns:
      The hidden states after the last layer, in the dtype of `hidden`; and the cache with the tokens written and not
      yet counted.

    Raises:
      Unsupported: more sequences than `most_sequences`; layers that are not packed and joined (`join_projections`) or
        differ in activation bits or backend; experts; norms, scores or rotations of another kind; and as
        `ops.decode_layers`.
    """
    operands, options = _fused_operands(layers, config, hidden, tables, cache, first_layer, most_sequences)
    outcome, qkv = ops.decode_layers(*operands, **options)
    heads = qkv.reshape(*qkv.shape[:2], -1, config.head_dim)[:, :, config.num_heads :]
    keys, values = jnp.split(heads, 2, axis=2)
    if config.qk_norm:
        keys = jax.vmap(lambda norm, keys: norm(keys))(as_prologue(layers.attention.k_norm), keys)
    if tables is not None:  # `rotate` takes layers as sequences, and sequences as their positions
        keys = rotate(keys, tuple(jnp.broadcast_to(table[:, 0], (len(keys), *table[:, 0].shape)) for table in tables))
    return outcome.astype(hidden.dtype)[:, None], cache.write_all(keys[:, :, None], values[:, :, None], first_layer)


def explain_fused_layers(
    layers: nnx.Module,
    config: TransformerConfig,
    hidden: Float[Array, "batch 1 hidden"],
    tables: tuple[Float[Array, "batch 1 half"], Float[Array, "batch 1 half"]] | None,
    cache: KVCache,
    first_layer: int = 0,
    *,
    most_sequences: int = MOST_SEQUENCES,
) -> Step:
    """What `fused_layers` runs for these operands. Raises Unsupported as it does."""
    operands, options = _fused_operands(layers, config, hidden, tables, cache, first_layer, most_sequences)
    return Step("all layers, cache write", ops.explain(ops.decode_layers, *operands, **options))


def _fused_operands(
    layers, config: TransformerConfig, hidden, tables, cache: KVCache, first_layer: int, most_sequences: int
) -> tuple[tuple, dict[str, Any]]:
    """Operands and options of `ops.decode_layers`. Raises Unsupported as `fused_layers` says."""
    if hidden.shape[0] > most_sequences:
        most = "one sequence" if most_sequences == 1 else f"up to {most_sequences} sequences"
        raise Unsupported(f"layers are one kernel for {most}, not for {hidden.shape[0]}")
    if (differs := _differs(config, cache)) is not None:
        raise Unsupported(f"the kernel of all layers does not compute this model: {differs}")
    if hasattr(layers.ffn, "experts"):
        raise Unsupported("the kernel of all layers does not compute experts")
    gate = gate_activation(config.ffn)
    gated = gate is not None
    products = {
        "qkv": getattr(layers.attention, "qkv_proj", None),
        "o": layers.attention.o_proj,
        "up": getattr(layers.ffn, "gate_up_proj" if gated else "up_proj", None),
        "down": layers.ffn.down_proj,
    }
    for name, layer in products.items():
        if getattr(layer, "order", None) is not None:
            raise Unsupported(f"the {name} projections gather their inputs in the order of their groups")
        if not fuses(layer):
            raise Unsupported(f"the {name} projections must be one packed layer")
        if layer.k_axes is not None:
            raise Unsupported(
                f"the rows of the {name} projections are cut over devices, which add their sums: the kernel has no way "
                "out for sums in the middle, and each device runs layer by layer"
            )
    operands = (
        hidden[:, 0],
        {name: layer.kernel.get_value() for name, layer in products.items()},
        {name: None if layer.bias is None else layer.bias[...] for name, layer in products.items()},
        layer_norms(layers),
        dataclasses.replace(gate if gated else Activation(config.ffn), rotation=layers.ffn.rotation),
        *(tuple(jax.tree.leaves(kept)) for kept in (cache.keys, cache.values)),
        jnp.minimum(cache.lengths, cache.capacity),
        None if tables is None else tuple(table[:, 0] for table in tables),
        jnp.asarray(alibi_slopes(config.num_heads), jnp.float32) if config.positions == "alibi" else None,
        _activation_format(products),
    )
    options = {"cache_bits": cache.bits, "implementation": shared_implementation(products.values())}
    if first_layer:
        options["first_layer"] = first_layer
    if cache.key_rotation is not None:
        options["key_rotation"] = cache.key_rotation
    spans = {name: layer.precision.a_span for name, layer in products.items()}
    return operands, options if set(spans.values()) == {1.0} else {**options, "spans": spans}


def layer_norms(layers: nnx.Module) -> dict[str, Prologue]:
    """The norms of a layer, or of a stack, by the names that `ops.decode_layers` has for them."""
    norms = {"qkv": layers.attention_norm, "up": layers.ffn_norm}
    if hasattr(layers.attention, "q_norm"):
        norms |= {"queries": layers.attention.q_norm, "keys": layers.attention.k_norm}
    return {name: as_prologue(norm) for name, norm in norms.items()}


def _differs(config: TransformerConfig, cache: KVCache) -> str | None:
    """What the model computes that `ops.decode_layers` does not, in words; None if nothing."""
    named = {
        "devices share the positions of the cache": cache.cut is not None,
        "norms follow the blocks": config.post_norms,
        "norms precede the last projections": config.sub_norms,
        "gates are squared": config.ffn == "relu2glu",
        "a part of each head is rotated": config.num_rotary != config.head_dim,
        "layers rotate by different frequencies": config.window_rope_theta is not None,
    }
    scores = Scoring.of(config).differs(cache.capacity, config.head_dim)
    found = [name for name, differs in named.items() if differs] + ([] if scores is None else [scores])
    return ", ".join(found) or None


def _activation_format(products: dict[str, Linear]) -> BipolarFormat | None:
    """None for float activations."""
    grids = {(layer.precision.a_bits, layer.precision.a_symmetric) for layer in products.values()}
    if len({a_bits for a_bits, _ in grids}) > 1:
        raise Unsupported(f"activations must have the same bits in all products, not { {bits for bits, _ in grids} }")
    if len(grids) > 1:
        raise Unsupported("activations must be symmetric in all products or in none")
    ((a_bits, symmetric),) = grids
    return None if a_bits is None else BipolarFormat(a_bits, symmetric=symmetric)

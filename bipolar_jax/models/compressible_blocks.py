"""A Transformer block by block, for `bipolar_jax.compress`: see `nn.compressible`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.models.blocks.attention import Heads, causal_attention, prompts_alibi
from bipolar_jax.models.blocks.norm import make_norm
from bipolar_jax.models.blocks.prompt_heads import Projections, PromptTables, prompt_heads, prompt_tables
from bipolar_jax.models.blocks.rope import Tables
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.nn.compressible import Rotation, Sites, StreamEnds, ValueHeads
from bipolar_jax.nn.layers.packed import CountedModule


class Positions(NamedTuple):
    """What all layers need to know of the positions of whole texts.

    Attributes:
      tables: cosines and sines, where positions are rotary.
      bias: ALiBi's biases on the scores, where it is used.
    """

    tables: PromptTables | None
    bias: Float[Array, "1 heads #length length"] | None


class BlockCarry(NamedTuple):
    """What passes from block to block."""

    hidden: Float[Array, "batch length hidden"]
    positions: Positions


def attend_to_text(
    projections: Projections,
    kv_heads: int,
    positions: Positions,
    cache: KVCache | None = None,
    layer: Int[Array, ""] | None = None,
) -> tuple[Heads, KVCache | None]:
    """The context of every token of whole texts; and the cache, if there is one, with this layer's keys and values."""
    index = jnp.int32(0) if layer is None else layer
    q, k, v, cache = prompt_heads(projections, kv_heads, positions.tables, cache, index)
    return causal_attention(q, k, v, bias=positions.bias), cache


def rotate_stream(
    config: TransformerConfig, hidden: Float[Array, "batch length hidden"]
) -> Float[Array, "batch length hidden"]:
    """Embeddings in the basis of the residual stream, without their mean where the model has LayerNorms."""
    numbers = hidden.astype(jnp.float32)
    if config.norm == "layer":
        numbers = numbers - jnp.mean(numbers, axis=-1, keepdims=True)
    return config.rotation.stream.rotate(numbers).astype(hidden.dtype)


class CompressibleBlocks(CountedModule):
    """Implements `nn.compressible.Rotatable` for a model with a stack of layers."""

    config: TransformerConfig
    layers: nnx.Module
    enter_prompts: Callable[[Int[Array, "batch length"]], tuple[Float[Array, "batch length hidden"], Tables | None]]

    @property
    def block_sites(self) -> tuple[Sites, ...]:
        """Query, key and value; the output of attention; gate and up; down. Joined layers are one."""
        attention, ffn = self.layers.attention, self.layers.ffn
        heads = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        inner = ("gate_up_proj",) if hasattr(ffn, "gate_up_proj") else ("gate_proj", "up_proj")
        values = None if heads == ("qkv_proj",) else "attention/v_proj"
        # silu(gate) * up and relu(up) are proportional to up; gelu(up) is not.
        proportional = inner != ("gate_up_proj",) and self.config.ffn in ("swiglu", "relu")
        return (
            Sites(tuple(f"attention/{name}" for name in heads), to_stream=False, norm="attention_norm"),
            Sites(("attention/o_proj",), to_stream=True, proportional_to=values),
            Sites(tuple(f"ffn/{name}" for name in inner if hasattr(ffn, name)), to_stream=False, norm="ffn_norm"),
            Sites(("ffn/down_proj",), to_stream=True, proportional_to="ffn/up_proj" if proportional else None),
        )

    @property
    def num_blocks(self) -> int:
        """Decoder layers."""
        return self.config.num_layers

    def block(self, index: int) -> nnx.Module:
        """A decoder layer, without the layer axis. Raises IndexError if there is none of this index."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"the model has the blocks 0 to {self.num_blocks - 1}, not {index}")
        return jax.tree.map(lambda leaf: leaf[index], self.layers)

    def with_blocks(self, blocks: Sequence[nnx.Module]) -> Self:
        """A new model with these layers, stacked. Raises ValueError unless they fit one stack of this model."""
        if len(blocks) != self.num_blocks:
            raise ValueError(f"the model has {self.num_blocks} blocks, got {len(blocks)}")
        first, *others = map(jax.tree.structure, blocks)
        if different := [index for index, structure in enumerate(others, 1) if structure != first]:
            raise ValueError(
                f"blocks {different} differ from block 0 in their layers, precisions or dtypes: all blocks are one "
                "stack, so give them the same rules"
            )
        model = nnx.merge(*nnx.split(self))
        model.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return model

    def enter_blocks(self, ids: Int[Array, "batch length"]) -> BlockCarry:
        """The input of the first layer, and the positions of whole texts."""
        return self.block_carry(*self.enter_prompts(ids))

    def block_carry(self, hidden: Float[Array, "batch length hidden"], tables: Tables | None) -> BlockCarry:
        """The same from what `enter_prompts` gives."""
        bias = prompts_alibi(self.queries(hidden)) if self.config.positions == "alibi" else None
        return BlockCarry(hidden, Positions(None if tables is None else prompt_tables(self.config, tables), bias))

    def run_block(self, block: nnx.Module, carry: BlockCarry) -> BlockCarry:
        """The carry of the next layer."""

        def attend(projections):
            return attend_to_text(projections, self.config.num_kv_heads, carry.positions)[0]

        return carry._replace(hidden=block(carry.hidden, attend))

    def stream(self, carry: BlockCarry) -> Float[Array, "batch length hidden"]:
        """The hidden states before the next norm."""
        return carry.hidden

    @property
    def stream_ends(self) -> StreamEnds:
        """The embeddings, the final norm and the output layer."""
        tables = ("embed", "positions") if self.config.positions == "learned" else ("embed",)
        output = None if self.config.tie_embeddings else "lm_head"
        return StreamEnds(tables, not self.config.embed_norm, "final_norm", output)

    @property
    def value_heads(self) -> ValueHeads:
        """The value heads of a layer."""
        return ValueHeads("attention/v_proj", "attention/o_proj", self.config.head_dim)

    @property
    def inner(self) -> str:
        """The layer whose input R4 rotates."""
        return "ffn/down_proj"

    @property
    def rotation(self) -> Rotation | None:
        """The bases of the weights."""
        return self.config.rotation

    def with_rotation(self, rotation: Rotation) -> Self:
        """The model with these rotations at run time, its weights as they are, and RMSNorms in a rotated stream."""
        model = nnx.merge(*nnx.split(self))
        model.config = dataclasses.replace(self.config, rotation=rotation)
        model.layers.ffn.rotation = rotation.ffn
        for name in ("attention_norm", "ffn_norm"):
            scale = getattr(self.layers, name).scale
            make = functools.partial(make_norm, model.config.block_norm, model.config, param_dtype=scale.dtype)
            if isinstance(getattr(self.layers, name), nnx.LayerNorm) and model.config.block_norm == "rms":
                norm = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
                norm.scale = nnx.Param(scale[...])
                setattr(model.layers, name, norm)
        return model

    def queries(self, hidden: Float[Array, "batch length hidden"]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a layer's queries."""
        return jax.ShapeDtypeStruct((*hidden.shape[:2], self.config.num_heads, self.config.head_dim), hidden.dtype)

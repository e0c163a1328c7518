"""A decoder-only Transformer, its layers stacked and scanned; its config makes it a Llama, a Gemma or an OPT.

Every parameter of `layers` has a leading layer axis, so that the stack compiles as one layer. Layers that are packed
differently, or of which some have experts, are several stacks, see `nn.compressible.Layered`. Each layer is given the
function that attends: training and prefill attend causally within the sequence, decoding attends to a `KVCache`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.attention import Heads, attend_to_cache
from bipolar_jax.models.blocks.compiled_method import check_axes_are_auto, compiled_method, on_auto_axes
from bipolar_jax.models.blocks.experts import MixtureOfExperts, with_experts, without_experts
from bipolar_jax.models.blocks.feed_forward import MLP, GatedMLP
from bipolar_jax.models.blocks.fused_decode import MOST_SEQUENCES, fused_layers
from bipolar_jax.models.blocks.norm import Norm, as_prologue, make_norm, normalize, project_onto
from bipolar_jax.models.blocks.prompt_heads import Projections
from bipolar_jax.models.blocks.rope import Tables, TablesByKind, rope_tables, tables_of_layer
from bipolar_jax.models.blocks.scoring import Scoring, cap
from bipolar_jax.models.compressible_blocks import BlockCarry, CompressibleBlocks, attend_to_text, rotate_stream
from bipolar_jax.models.config import GATED_FFNS, TransformerConfig
from bipolar_jax.models.expert_config import Experts
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.cut_positions import CutPositions
from bipolar_jax.nn.layers.packed import CountedModule

Attend = Callable[[Projections], Heads]


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError if a token id is not an integer, or outside the vocabulary."""
    found = np.asarray(ids)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        shown = f"{ids!r:.100}"
        raise ValueError(f"token ids must be a sequence of integers, got {shown}: encode the text with a tokenizer")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids span {low}..{high}, outside the vocabulary 0..{vocab_size - 1}: "
            "was the text encoded by another model's tokenizer?"
        )


def check_transformer(model: Any) -> None:
    """Raises ValueError unless it is a `Transformer`, or one that is cut over a mesh."""
    if not isinstance(getattr(model, "config", None), TransformerConfig):
        raise ValueError(f"got a {type(model).__name__}: give a Transformer, such as the model of a PretrainedModel")


class Attention(CountedModule):
    """x + grouped-query self-attention of norm(x); positions enter by `x` or by `attend`.

    Where the config says so, each head of queries and keys is normalized, and so is what enters the output projection.
    """

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, param_dtype=param_dtype, dtype=param_dtype, rngs=rngs)
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.num_kv_heads = config.num_kv_heads
        self.q_proj = linear(config.hidden_size, query_size, use_bias=config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_size, use_bias=config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_size, use_bias=config.qkv_bias)
        self.o_proj = linear(query_size, config.hidden_size, use_bias=config.linear_bias)
        rms = functools.partial(make_norm, "rms", config, param_dtype=param_dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm, self.k_norm = rms(config.head_dim), rms(config.head_dim)
        if config.sub_norms:
            self.sub_norm = rms(query_size)
        # Of one device's heads: the others are padding, which `models.sharding` zeroes.
        self.used_heads: nnx.Variable | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "batch length hidden"], norm: Norm, attend: Attend, post_norm: Norm | None = None
    ) -> Float[Array, "batch length hidden"]:
        context = attend(self.projections(x, norm))
        if self.used_heads is not None:
            is_used = jnp.arange(context.shape[2], dtype=jnp.int32)[:, None] < self.used_heads[...]
            context = jnp.where(jnp.broadcast_to(is_used, context.shape), context, jnp.zeros_like(context))
        prologue = as_prologue(self.sub_norm) if hasattr(self, "sub_norm") else None
        return project_onto(x, self.o_proj, context.reshape(*context.shape[:2], -1), prologue, post_norm)

    def projections(self, x: Float[Array, "batch length hidden"], norm: Norm) -> Projections:
        """Queries, keys and values of norm(x), for `attend` to compute."""
        joined = hasattr(self, "qkv_proj")  # see `join_projections`
        layers = [self.qkv_proj] if joined else [self.q_proj, self.k_proj, self.v_proj]
        head_norms = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else None
        return Projections(layers, norm, x, self.head_dim, head_norms, self.num_kv_heads)


class DecoderLayer(CountedModule):
    """Pre-norm residual block: attention, then feed-forward; in some models a norm follows either, too.

    `experts` are those of the feed-forward block; None for a dense one.
    """

    def __init__(
        self, config: TransformerConfig, experts: Experts | None = None, *, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        feed_forward = GatedMLP if config.ffn in GATED_FFNS else MLP
        if experts is not None:
            feed_forward = functools.partial(MixtureOfExperts, experts=experts)
        make = functools.partial(make_norm, config.block_norm, config, param_dtype=param_dtype, rngs=rngs)
        self.attention_norm = make()
        self.attention = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.ffn_norm = make()
        self.ffn = feed_forward(config, param_dtype=param_dtype, rngs=rngs)
        if config.post_norms:
            self.attention_post_norm, self.ffn_post_norm = make(), make()

    def __call__(self, x: Float[Array, "batch length hidden"], attend: Attend) -> Float[Array, "batch length hidden"]:
        after_attention, after_ffn = self.post_norms
        return self.ffn(self.attention(x, self.attention_norm, attend, after_attention), self.ffn_norm, after_ffn)

    @property
    def post_norms(self) -> tuple[Norm | None, Norm | None]:
        """The norms of the outputs of attention and feed-forward block; None where the model has none."""
        return getattr(self, "attention_post_norm", None), getattr(self, "ffn_post_norm", None)


class Transformer(CompressibleBlocks):
    """Token ids to next-token logits.

    `model(ids)` is the full forward pass. Generation has two steps that share a `KVCache`: `prefill` reads whole
    prompts, `decode` one token of each sequence. Both ways, and any batch, give the same logits up to the rounding of
    float sums; quantized activations may also round to other steps.
    """

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.fused_sequences = MOST_SEQUENCES  # that one kernel may decode, see `prepare_for_inference`
        # Set by `models.sharding`: how devices share positions of caches, and the mesh axis that cuts those of prompts.
        self.cut_positions: CutPositions | None = None
        self.token_axis: str | None = None
        embed = functools.partial(nnx.Embed, param_dtype=param_dtype, dtype=param_dtype, rngs=rngs)
        self.embed = embed(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.positions = embed(config.context_length, config.hidden_size)
        if config.embed_norm:
            self.embed_norm = make_norm(config.norm, config, param_dtype=param_dtype, rngs=rngs)

        @nnx.vmap(in_axes=(None, 0), out_axes=0)
        def make_layers(experts, layer_rngs):
            return DecoderLayer(config, experts, param_dtype=param_dtype, rngs=layer_rngs)

        stacks = [make_layers(config.experts_of(run.start), rngs.split(len(run))) for run in config.runs]
        self.layers = self.as_layers(config.runs, stacks)
        self.final_norm = make_norm(config.norm, config, param_dtype=param_dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                param_dtype=param_dtype,
                dtype=param_dtype,
                rngs=rngs,
            )

    def check_ids(self, ids: Int[np.ndarray | Array, "batch length"]) -> None:
        """Raises ValueError for windows longer than the context, or with ids outside the vocabulary."""
        check_ids(np.asarray(ids).reshape(-1), self.config.vocab_size)
        if np.shape(ids)[1] > self.config.context_length:
            raise ValueError(
                f"windows of {np.shape(ids)[1]} tokens exceed the model's context of {self.config.context_length}"
            )

    @compiled_method
    @on_auto_axes
    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Logits of every position, which attends to itself and to all before it; float32; empty of no ids."""
        return self.logits(self.hidden_states(ids))

    @compiled_method
    @on_auto_axes
    def hidden_states(
        self, ids: Int[Array, "batch length"], cache_bits: int | None = None
    ) -> Float[Array, "batch length hidden"]:
        """Hidden states of every position after the final norm: `__call__` without the output layer.

        With `cache_bits`, 8 or 4, every position attends to keys and values as a cache of so many bits keeps them.
        """
        hidden, tables = self.enter_prompts(ids)
        if ids.size:  # kernels, and sizes that are left to a reshape, need a token
            hidden, _ = self._causal_layers(hidden, tables, cache_bits=cache_bits)
        return self.leave_blocks(hidden)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """The output layer, for hidden states after the final norm; float32."""
        project = self.embed.attend if self.config.tie_embeddings else self.lm_head
        return cap(project(hidden).astype(jnp.float32), self.config.logit_softcap)

    def predict(self, carry: BlockCarry) -> Float[Array, "batch length vocab"]:
        """Logits of every position, from what the last block leaves; see `nn.compressible`."""
        return self.logits(self.leave_blocks(self.stream(carry)))

    @property
    def output_layer(self) -> nnx.Module:
        """The layer that `logits` multiplies with: the embedding where it is tied."""
        return self.embed if self.config.tie_embeddings else self.lm_head

    @compiled_method
    def prefill(
        self,
        ids: Int[Array, "batch length"],
        lengths: Int[Array, " batch"],
        capacity: int,
        cache_bits: int | None = None,
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Reads prompts that are padded on the right.

        Not differentiable on Hopper GPUs, like `decode`; train through `__call__`.

        Args:
          ids: prompts; entries from `lengths` on are ignored.
          lengths: true length of each prompt, at least 1.
          capacity: positions of the cache, for prompt and new tokens together.
          cache_bits: bits of the cached keys and values, 8 or 4; None keeps the model's dtype. Attention within the
            prompts uses the numbers before they are quantized.

        Returns:
          Logits after the last token of each prompt, float32; and the cache to decode from.

        Raises:
          ValueError: other cache_bits, prompts longer than `capacity` or the model's context, or no token; ids on a
            mesh of Explicit axes.
        """
        if not ids.size:
            raise ValueError(f"prompts need at least one token to predict from, got ids of shape {ids.shape}")
        check_axes_are_auto(ids)
        lengths = lengths.astype(jnp.int32)
        hidden, tables = self.enter_prompts(ids, capacity)
        cache = self.empty_cache(hidden.dtype, lengths, capacity, cache_bits)
        hidden, cache = self._causal_layers(hidden, tables, cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(self.leave_blocks(last)), cache

    def empty_cache(
        self, dtype: jnp.dtype, lengths: Int[Array, " batch"], capacity: int, cache_bits: int | None
    ) -> KVCache:
        """The cache that `prefill` fills."""
        config = self.config
        shape = (config.num_layers, len(lengths), config.num_kv_heads, capacity, config.head_dim)
        cut = None if self.cut_positions is None else dataclasses.replace(self.cut_positions, capacity=capacity)
        return KVCache.empty(shape, dtype, cache_bits, lengths, config.key_rotation(cache_bits), cut)

    @compiled_method
    def decode(self, ids: Int[Array, " batch"], cache: KVCache) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Appends one token to every sequence; returns the next logits, float32, and the cache with the token."""
        hidden, tables = self.enter_tokens(ids, cache)
        for run, stack in self.stacks:
            try:
                operands = (stack, self.config, hidden, tables, cache, run.start)
                hidden, cache = fused_layers(*operands, most_sequences=self.fused_sequences)
            except Unsupported:
                hidden, cache = self._decode_layers(hidden, tables, cache, [(run, stack)])
        return self.logits(self.leave_blocks(hidden[:, 0])), cache.advance()

    def _decode_layers(
        self,
        hidden: Float[Array, "batch 1 hidden"],
        tables: Tables | TablesByKind[Tables] | None,
        cache: KVCache,
        stacks: Sequence[tuple[range, nnx.Module]],
    ) -> tuple[Float[Array, "batch 1 hidden"], KVCache]:
        """Layer by layer: hidden states after these stacks; and the cache with the tokens, not yet counted."""
        alibi, scoring = self.config.positions == "alibi", Scoring.of(self.config)

        def attend(projections, cache, index):
            here = scoring.at(index)
            own_tables = tables_of_layer(tables, here.windowed)
            return attend_to_cache(projections.heads(), cache, index, own_tables, alibi=alibi, scoring=here)

        return self._through_layers(hidden, cache, attend, stacks)

    def _causal_layers(
        self,
        hidden: Float[Array, "batch length hidden"],
        tables: Tables | TablesByKind[Tables] | None,
        cache: KVCache | None = None,
        cache_bits: int | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], KVCache | None]:
        """Hidden states before the final norm; and the cache, if there is one, with every layer's keys and values."""
        start = self.block_carry(hidden, tables, cache_bits)

        def attend(projections, cache, index):
            return attend_to_text(projections, self.config.num_kv_heads, start.positions, cache, index)

        hidden, cache = self._through_layers(self.own_tokens(hidden), cache, attend, self.stacks)
        if self.token_axis is not None:
            hidden = jax.lax.all_gather(hidden, self.token_axis, axis=1, tiled=True)
        return hidden, cache

    def own_tokens(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch own hidden"]:
        """The positions that this device has between products of prompts; all, where devices do not divide them."""
        if self.token_axis is None:
            return hidden
        size = hidden.shape[1] // jax.lax.axis_size(self.token_axis)
        return jax.lax.dynamic_slice_in_dim(hidden, jax.lax.axis_index(self.token_axis) * size, size, axis=1)

    def _through_layers(
        self,
        hidden: Float[Array, "batch length hidden"],
        cache: KVCache | None,
        attend: Callable[[Projections, KVCache | None, Int[Array, ""]], tuple[Heads, KVCache | None]],
        stacks: Sequence[tuple[range, nnx.Module]],
    ) -> tuple[Float[Array, "batch length hidden"], KVCache | None]:
        """Hidden states and cache after the stacks; `attend` takes a layer's projections, the cache, and its index."""

        def step(experts, start, carry, layer):
            hidden, cache, index = carry
            written = cache
            layer = layer if experts is None else with_experts(layer, experts, index - start)

            def attend_here(projections):
                nonlocal written
                context, written = attend(projections, cache, index)
                return context

            hidden = layer(hidden, attend_here)
            return (hidden, written, index + 1), None

        # Kernels read the index from memory, where a carry is; XLA would slice a scanned array by one more kernel.
        for run, stack in stacks:
            stack, experts = (stack, None) if cache is None else without_experts(stack)
            step_of_run = functools.partial(step, experts, run.start)
            (hidden, cache, _), _ = jax.lax.scan(step_of_run, (hidden, cache, jnp.int32(run.start)), stack)
        return hidden, cache

    def enter_prompts(
        self, ids: Int[Array, "batch length"], capacity: int | None = None
    ) -> tuple[Float[Array, "batch length hidden"], Tables | TablesByKind[Tables] | None]:
        """The input of the first layer, and the rotary tables where positions are rotary, of whole texts.

        Frequencies of "longrope" depend on the positions of the cache that follows, the `capacity`; None has no cache.

        Raises:
          ValueError: ids of another shape; more than config.context_length, unless positions are "alibi".
        """
        if ids.ndim != 2:
            raise ValueError(f"token ids must have shape [batch, length], got {ids.shape}: one text is ids[None]")
        context, kind = self.config.context_length, self.config.positions
        if ids.shape[1] > context and kind != "alibi":  # rotary angles beyond it were not trained: texts become noise
            remedy = ", or give model.config a longer context_length" if kind == "rope" else ""
            raise ValueError(f"{ids.shape[1]} tokens exceed the model's context of {context}: shorten the text{remedy}")
        room = ids.shape[1] if capacity is None else capacity
        return self._enter(ids, jnp.arange(ids.shape[1])[None], room)

    def enter_tokens(
        self, ids: Int[Array, " batch"], cache: KVCache
    ) -> tuple[Float[Array, "batch 1 hidden"], Tables | TablesByKind[Tables] | None]:
        """Likewise of one new token of each sequence, at the next position of the cache."""
        if ids.ndim != 1:
            raise ValueError(f"new token ids must have shape [batch], one of each sequence, got {ids.shape}")
        return self._enter(ids[:, None], cache.lengths[:, None], cache.capacity)

    def leave_blocks(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Hidden states after the final norm, of those that the last layer leaves."""
        rotation = self.config.rotation
        if rotation is not None and rotation.leaves:
            hidden = rotation.stream.undo(hidden)
        return normalize(self.final_norm, hidden)

    def _enter(
        self, ids: Int[Array, "batch length"], positions: Int[Array, "#batch length"], room: int
    ) -> tuple[Float[Array, "batch length hidden"], Tables | TablesByKind[Tables] | None]:
        config = self.config
        hidden = self.embed(ids)
        if config.embed_scale != 1:
            hidden = hidden * jnp.asarray(config.embed_scale, hidden.dtype)
        if config.positions == "learned":
            hidden = hidden + self.positions(positions)
        if config.embed_norm:
            hidden = normalize(self.embed_norm, hidden)
        if config.rotation is not None and config.rotation.enters:
            hidden = rotate_stream(config, hidden)
        return hidden, rope_tables(config, positions, room) if config.positions == "rope" else None

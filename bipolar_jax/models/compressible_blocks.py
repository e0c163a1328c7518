"""A Transformer block by block, for `bipolar_jax.compress`: see `nn.compressible`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.models.blocks.attention import Heads, causal_attention, prompts_alibi
from bipolar_jax.models.blocks.norm import make_norm
from bipolar_jax.models.blocks.prompt_heads import Projections, PromptTables, prompt_heads, prompt_tables
from bipolar_jax.models.blocks.rope import Tables, TablesByKind, tables_of_layer
from bipolar_jax.models.blocks.scoring import PLAIN, Scoring
from bipolar_jax.models.config import GATED_FFNS, TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.quantized_heads import CACHE_BITS, as_read, check_cache_bits
from bipolar_jax.nn.compressible import Rotation, Sites, StreamEnds, ValueHeads, run_name, run_of_name
from bipolar_jax.nn.layers.packed import CountedModule
from bipolar_jax.ops import Hadamard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """What all layers need to know of the positions of whole texts.

    Attributes:
      tables: cosines and sines, where positions are rotary.
      bias: ALiBi's biases on the scores, where it is used.
      cache_bits: keys and values are rounded as a cache of so many bits would keep them; None leaves them.
      key_rotation: of queries and keys before that, or None.
      scoring: of all layers: scale and cap of scores, and windows.
    """

    tables: PromptTables | TablesByKind[PromptTables] | None
    bias: Float[Array, "1 heads #length length"] | None
    cache_bits: int | None = dataclasses.field(default=None, metadata={"static": True})
    key_rotation: Hadamard | None = dataclasses.field(default=None, metadata={"static": True})
    scoring: Scoring = PLAIN


class BlockCarry(NamedTuple):
    """What passes from block to block; `layer` is the next one's index, where layers differ in windows, else None."""

    hidden: Float[Array, "batch length hidden"]
    positions: Positions
    layer: Int[Array, ""] | None = None


def attend_to_text(
    projections: Projections,
    kv_heads: int,
    positions: Positions,
    cache: KVCache | None = None,
    layer: Int[Array, ""] | None = None,
) -> tuple[Heads, KVCache | None]:
    """The context of every token of whole texts; and the cache, if there is one, with this layer's keys and values."""
    index = jnp.int32(0) if layer is None else layer
    scoring = positions.scoring.at(index)
    tables = tables_of_layer(positions.tables, scoring.windowed)
    q, k, v, cache = prompt_heads(projections, kv_heads, tables, cache, index)
    if positions.key_rotation is not None:
        q, k = positions.key_rotation.rotate(q), positions.key_rotation.rotate(k)
    if positions.cache_bits is not None:
        k, v = as_read(k, positions.cache_bits), as_read(v, positions.cache_bits)
    return causal_attention(q, k, v, bias=positions.bias, scoring=scoring), cache


def rotate_stream(
    config: TransformerConfig, hidden: Float[Array, "batch length hidden"]
) -> Float[Array, "batch length hidden"]:
    """Embeddings in the basis of the residual stream, without their mean where the model has LayerNorms."""
    numbers = hidden.astype(jnp.float32)
    if config.norm == "layer":
        numbers = numbers - jnp.mean(numbers, axis=-1, keepdims=True)
    return config.rotation.stream.rotate(numbers).astype(hidden.dtype)


class CompressibleBlocks(CountedModule):
    """Implements `nn.compressible.Rotatable` and `Layered` for a model with stacks of layers.

    Attributes:
      layers: the stack; or the stacks by the names of their runs, see `nn.compressible.run_name`.
    """

    stack = "layers"
    cached_bits = CACHE_BITS
    config: TransformerConfig
    layers: nnx.Module
    enter_prompts: Callable[
        [Int[Array, "batch length"]],
        tuple[Float[Array, "batch length hidden"], Tables | TablesByKind[Tables] | None],
    ]

    @property
    def stacks(self) -> tuple[tuple[range, nnx.Module], ...]:
        """The indices of the layers of every stack, and the stack; in order."""
        if not isinstance(self.layers, nnx.Dict):
            return ((range(self.num_blocks), self.layers),)
        stacks = ((run_of_name(name), stack) for name, stack in self.layers.items())
        return tuple(sorted(stacks, key=lambda found: found[0].start))

    @property
    def runs(self) -> tuple[range, ...]:
        """The indices of the layers of every stack."""
        return tuple(run for run, _ in self.stacks)

    def with_runs(self, runs: Sequence[range]) -> Self:
        """The model with its stacks cut into these runs of layers; the numbers stay the same.

        Raises:
          ValueError: runs that do not have all layers in order, or that would join layers of several stacks.
        """
        starts = [0, *(run.stop for run in runs)]
        ends_fit = starts == [*(run.start for run in runs), self.num_blocks] and all(run.step == 1 for run in runs)
        if not ends_fit or not all(runs) or not {run.start for run in self.runs} <= {run.start for run in runs}:
            raise ValueError(f"the runs {list(map(run_name, self.runs))} cannot be cut into {list(runs)}")
        stacks = []
        for run in runs:
            whole, stack = next(found for found in self.stacks if run.start in found[0])
            at = slice(run.start - whole.start, run.stop - whole.start)
            stacks.append(jax.tree.map(lambda leaf, at=at, same=run == whole: leaf if same else leaf[at], stack))
        return self._with_stacks(runs, stacks)

    def _with_stacks(self, runs: Sequence[range], stacks: Sequence[nnx.Module]) -> Self:
        model = nnx.merge(*nnx.split(self))
        model.layers = self.as_layers(runs, stacks)
        return model

    @staticmethod
    def as_layers(runs: Sequence[range], stacks: Sequence[nnx.Module]) -> nnx.Module:
        """What `layers` is for these stacks of the layers of these runs."""
        named = dict(zip(map(run_name, runs), stacks, strict=True))
        return stacks[0] if len(stacks) == 1 else nnx.Dict(named)

    @property
    def block_sites(self) -> tuple[Sites, ...]:
        """Query, key and value; the output of attention; gate and up; down. Joined layers are one.

        Raises:
          ValueError: experts in some layers, so that blocks have different sites.
        """
        if len(self.config.runs) > 1:
            raise ValueError(
                "some layers have experts and some are dense, so that blocks have different sites: compress no such "
                "model with data, but round it by quantize_model"
            )
        layers = self.stacks[0][1]
        attention, ffn = layers.attention, layers.ffn
        heads = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        ffn = ffn if self.config.experts is None else ffn.experts
        inner = ("gate_up_proj",) if hasattr(ffn, "gate_up_proj") else ("gate_proj", "up_proj")
        values = None if heads == ("qkv_proj",) else "attention/v_proj"
        # function(gate) * up and relu(up) are proportional to up; gelu(up) and what a norm makes of them are not.
        proportional = inner != ("gate_up_proj",) and self.config.ffn in (*GATED_FFNS, "relu")
        if self.config.sub_norms:
            values, proportional = None, False
        o_norm, down_norm = ("attention_post_norm", "ffn_post_norm") if self.config.post_norms else (None, None)
        attention_sites = (
            Sites(tuple(f"attention/{name}" for name in heads), to_stream=False, norm="attention_norm"),
            Sites(("attention/o_proj",), to_stream=True, proportional_to=values, output_norm=o_norm),
        )
        if self.config.experts is not None:  # whose router reads the output of the norm, too
            return (
                *attention_sites,
                Sites(tuple(f"ffn/experts/{name}" for name in inner), to_stream=False, experts=True),
                Sites(("ffn/experts/down_proj",), to_stream=True, output_norm=down_norm, experts=True),
            )
        return (
            *attention_sites,
            Sites(tuple(f"ffn/{name}" for name in inner if hasattr(ffn, name)), to_stream=False, norm="ffn_norm"),
            Sites(
                ("ffn/down_proj",),
                to_stream=True,
                proportional_to="ffn/up_proj" if proportional else None,
                output_norm=down_norm,
            ),
        )

    @property
    def num_blocks(self) -> int:
        """Decoder layers."""
        return self.config.num_layers

    def block(self, index: int) -> nnx.Module:
        """A decoder layer, without the layer axis. Raises IndexError if there is none of this index."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"the model has the blocks 0 to {self.num_blocks - 1}, not {index}")
        run, stack = next(found for found in self.stacks if index in found[0])
        return jax.tree.map(lambda leaf: leaf[index - run.start], stack)

    def with_blocks(self, blocks: Sequence[nnx.Module]) -> Self:
        """A new model with these layers: consecutive ones of equal structure are one stack.

        Raises:
          ValueError: another number of layers.
        """
        if len(blocks) != self.num_blocks:
            raise ValueError(f"the model has {self.num_blocks} blocks, got {len(blocks)}")
        kinds = [(jax.tree.structure(block), [(x.shape, x.dtype) for x in jax.tree.leaves(block)]) for block in blocks]
        starts = [index for index, kind in enumerate(kinds) if index == 0 or kind != kinds[index - 1]]
        runs = [range(*ends) for ends in itertools.pairwise([*starts, len(blocks)])]
        return self._with_stacks(
            runs, [jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[i] for i in run)) for run in runs]
        )

    def enter_blocks(self, ids: Int[Array, "batch length"], cache_bits: int | None = None) -> BlockCarry:
        """The input of the first layer, and the positions of whole texts.

        With `cache_bits` all tokens attend to keys and values as a cache of 8 or 4 bits keeps them.
        """
        return self.block_carry(*self.enter_prompts(ids), cache_bits)

    def block_carry(
        self,
        hidden: Float[Array, "batch length hidden"],
        tables: Tables | TablesByKind[Tables] | None,
        cache_bits: int | None = None,
    ) -> BlockCarry:
        """The same from what `enter_prompts` gives."""
        check_cache_bits(cache_bits, self.config.head_dim)
        bias = prompts_alibi(self.queries(hidden)) if self.config.positions == "alibi" else None
        tables = None if tables is None else prompt_tables(self.config, tables)
        scoring = Scoring.of(self.config)
        positions = Positions(tables, bias, cache_bits, self.config.key_rotation(cache_bits), scoring)
        return BlockCarry(hidden, positions, None if scoring.windowed is None else jnp.int32(0))

    def run_block(self, block: nnx.Module, carry: BlockCarry) -> BlockCarry:
        """The carry of the next layer."""

        def attend(projections):
            return attend_to_text(projections, self.config.num_kv_heads, carry.positions, layer=carry.layer)[0]

        after = None if carry.layer is None else carry.layer + 1
        return carry._replace(hidden=block(carry.hidden, attend), layer=after)

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
    def value_heads(self) -> ValueHeads | None:
        """The value heads of a layer; None where a norm of all heads follows them."""
        return (
            None if self.config.sub_norms else ValueHeads("attention/v_proj", "attention/o_proj", self.config.head_dim)
        )

    @property
    def inner(self) -> str | None:
        """The layer whose input R4 rotates; None where a norm precedes it, and of experts."""
        return None if self.config.sub_norms or self.config.experts is not None else "ffn/down_proj"

    @property
    def rotation(self) -> Rotation | None:
        """The bases of the weights."""
        return self.config.rotation

    def with_rotation(self, rotation: Rotation) -> Self:
        """The model with these rotations at run time, its weights as they are, and RMSNorms in a rotated stream."""
        model = nnx.merge(*nnx.split(self))
        model.config = dataclasses.replace(self.config, rotation=rotation)
        for _, layers in model.stacks:
            layers.ffn.rotation = rotation.ffn
            for name in ("attention_norm", "ffn_norm"):
                scale = getattr(layers, name).scale
                make = functools.partial(make_norm, model.config.block_norm, model.config, param_dtype=scale.dtype)
                if isinstance(getattr(layers, name), nnx.LayerNorm) and model.config.block_norm == "rms":
                    norm = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
                    norm.scale = nnx.Param(scale[...])
                    setattr(layers, name, norm)
        return model

    def queries(self, hidden: Float[Array, "batch length hidden"]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a layer's queries."""
        return jax.ShapeDtypeStruct((*hidden.shape[:2], self.config.num_heads, self.config.head_dim), hidden.dtype)

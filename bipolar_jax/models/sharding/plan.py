"""What of a Transformer is cut over the devices of a mesh, what every device has whole, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cut_positions import CutPositions
from bipolar_jax.models.sharding.shares import Share, shares_of_heads
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Linear, fuses
from bipolar_jax.nn.layers.linear import is_plain
from bipolar_jax.packing import BipolarArray, BipolarNumbers, BlockScaledArray
from bipolar_jax.packing.cuts import cut_unit, partition_specs
from bipolar_jax.packing.words import WORD_BITS

# Axes of the mesh: texts are divided over the first, weights and heads over the second.
DATA, MODEL = "data", "model"
BLOCKS = ("attention", "ffn")  # of a layer
# Columns of an output layer whose vocabulary does not divide: rows of logits stay aligned.
_VOCABULARY_UNIT = 16
# Tensor cores scale no shorter groups.
_SHORTEST_GROUP = 16


def reduction_size(tokens: int, hidden_size: int, a_bits: int, *, scatters: bool) -> float:
    """Bytes whose all-reduce sends as much as what follows a product; see `ShardingPlan.reduced_bytes` for arguments.

    Sums of columns are all-reduced either way. Scattered sums cross the links once, where an all-reduce sends them
    twice; codes do, too, with three numbers a token.
    """
    sums, codes = 4 * tokens * hidden_size, tokens * (a_bits / 8 * hidden_size + 12)
    return 4 * hidden_size + ((sums + codes) / 2 if scatters else sums)


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How a model is cut over `MODEL`; nothing is cut over `DATA` but texts.

    Attributes:
      data, model: devices along each axis.
      queries, kv_heads: each device's heads, None where attention is whole: q, k and v are cut by columns, o by rows.
      width: each device's part of the feed-forward width, or None: gate and up by columns, down by rows.
      vocabulary: each device's columns of the output layer, or None.
      sharing: devices that share the positions of a head's cache; 1 where each device has all positions of its heads.
      cuts_tokens: whether prompts of enough tokens are cut over devices between products, see `scatters`.
      realigned: layers whose rows each device takes out of the whole array, because words or groups end elsewhere.
      whole: a sentence for each of these that every device has whole, with the reason.
    """

    data: int
    model: int
    queries: Share | None = None
    kv_heads: Share | None = None
    width: Share | None = None
    vocabulary: Share | None = None
    sharing: int = 1
    cuts_tokens: bool = False
    realigned: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def attention(self) -> bool:
        """Whether attention is cut."""
        return self.queries is not None

    @property
    def ffn(self) -> bool:
        """Whether feed-forward blocks are."""
        return self.width is not None

    @property
    def output(self) -> bool:
        """Whether the output layer is."""
        return self.vocabulary is not None

    @property
    def has_idle_heads(self) -> bool:
        """Whether a device has queries of zeros beside a head of keys: they attend to all, and are not 0 after it."""
        if not self.attention or self.kv_heads.size > 1 or self.kv_heads.total >= self.model:
            return False
        return any(0 < count < self.queries.size for count in self.queries.counts)

    def config_of_device(self, config: TransformerConfig) -> TransformerConfig:
        """The shapes of the model that one device runs."""
        sizes, rotation = {}, config.rotation
        if self.attention:
            sizes |= {"num_heads": self.queries.size, "num_kv_heads": self.kv_heads.size}
        if self.ffn:
            sizes["ffn_size"] = self.width.size
            if rotation is not None and rotation.ffn is not None:
                part = dataclasses.replace(rotation.ffn, blocks=self.width.size // rotation.ffn.block)
                rotation = dataclasses.replace(rotation, ffn=part)
        return dataclasses.replace(config, **sizes, rotation=rotation)

    def cut_positions(self, capacity: int) -> CutPositions | None:
        """How devices share the positions of a cache; None if they do not."""
        return None if self.sharing == 1 else CutPositions(MODEL, self.model, self.sharing, capacity)

    def scatters(self, batch: int, length: int) -> bool:
        """Whether texts of one device along `DATA` are cut over `MODEL`, position by position, between products.

        That takes half of the bytes of the sums, plus the codes (`reduced_bytes`), and one more exchange each: with few
        tokens an exchange costs more than its bytes.
        """
        divides = length % self.model == 0
        return self.cuts_tokens and divides and batch * length // self.model > FEW_TOKENS_LIMIT

    def reduced_bytes(self, tokens: int, hidden_size: int, a_bits: int, *, scatters: bool) -> float:
        """Bytes that a device sends after a layer's o, or its down, for the next product to have whole tokens.

        Args:
          tokens: of one device along `DATA`.
          hidden_size: sums of a token, int32.
          a_bits: of the codes that are gathered; 16 or 32 for floats.
          scatters: whether sums are reduce-scattered and codes are gathered, or sums are all-reduced.
        """
        size = reduction_size(tokens, hidden_size, a_bits, scatters=scatters)
        return 2 * (self.model - 1) / self.model * size

    def columns(self, head_dim: int) -> dict[str, Share]:
        """Layers whose columns are cut, and each device's."""
        found = {}
        if self.attention:
            keys = self.kv_heads.times(head_dim)
            found |= {"q_proj": self.queries.times(head_dim), "k_proj": keys, "v_proj": keys}
        if self.ffn:
            found |= {"gate_proj": self.width, "up_proj": self.width}
        return found | ({"lm_head": self.vocabulary} if self.output else {})

    def rows(self, head_dim: int) -> dict[str, Share]:
        """Layers whose rows are cut, and each device's: their sums are reduced."""
        found = {"o_proj": self.queries.times(head_dim)} if self.attention else {}
        return found | ({"down_proj": self.width} if self.ffn else {})

    def spec(self, path: tuple[Any, ...], value: Any, config: TransformerConfig) -> Any:
        """The spec of a parameter as the mesh cuts it, or the specs of a packed array's leaves.

        Where a share is no equal part every device has the array whole, and takes its share.

        Args:
          path: of the parameter in the model, such as ("layers", "attention", "o_proj", "kernel").
          value: the array, or its shape and dtype.
          config: of the whole model.
        """
        axis, share = self.cut_of(path, config)
        is_cut = share is not None and share.is_even and path[-2] not in self.realigned
        return _spec(value, axis if is_cut else None)

    def cut_of(self, path: tuple[Any, ...], config: TransformerConfig) -> tuple[int | None, Share | None]:
        """The axis of a parameter that devices share, and their shares of it; None where it is whole."""
        layer, name = (path[-2] if len(path) > 1 else None), path[-1]
        columns, rows = self.columns(config.head_dim), self.rows(config.head_dim)
        if layer in columns and name in ("kernel", "bias"):
            return -1, columns[layer]
        return (-2, rows[layer]) if layer in rows and name == "kernel" else (None, None)

    def device_bytes(self, path: tuple[Any, ...], value: Any, config: TransformerConfig) -> float:
        """Bytes of a parameter, or of its shapes and dtypes, that one device keeps."""
        axis, share = self.cut_of(path, config)
        is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
        specs = jax.tree.leaves(_spec(value, axis), is_leaf=is_spec)
        total = 0.0
        for leaf, spec in zip(jax.tree.leaves(value), specs, strict=True):
            size = leaf.size * leaf.dtype.itemsize
            total += size * share.size / share.total if MODEL in spec else size
        return total

    def __str__(self) -> str:
        parts = {"attention": self.attention, "feed-forward blocks": self.ffn, "output layer": self.output}
        cut = ", ".join(name for name, is_cut in parts.items() if is_cut) or "nothing"
        lines = [f"{self.data} x {self.model} devices ({DATA}, {MODEL}); cut over {MODEL}: {cut}"]
        return "\n".join([*lines, *(f"  {sentence}" for sentence in (*self.whole, *self._notes()))])

    def _notes(self) -> Iterator[str]:
        """A sentence for each block that has zeros, repeats heads or is cut within words or groups."""
        if self.attention and (self.queries.is_padded or self.kv_heads.is_padded):
            numbers = f"{self.queries.total} heads and {self.kv_heads.total} of keys and values"
            yield f"attention padded: {numbers}; a device has {self.queries.size} and {self.kv_heads.size}, some zeros"
        if self.attention and sum(self.kv_heads.counts) > self.kv_heads.total:
            kept = "all positions" if self.sharing == 1 else f"one position in {self.sharing}"
            heads = f"{self.kv_heads.total} heads on {sum(self.kv_heads.counts)} devices"
            yield f"keys and values repeated: {heads}, each of which caches {kept}"
        for name, share in (("feed-forward blocks", self.width), ("output layer", self.vocabulary)):
            if share is not None and share.is_padded:
                unit = "columns" if share is self.width else "tokens"
                yield f"{name} padded: {share.total} {unit}; a device has {share.size}, some zeros"
        if self.cuts_tokens:
            least = (FEW_TOKENS_LIMIT + 1) * self.model
            yield f"prompts of {least} tokens or more cut over {MODEL}: sums reduce-scattered, codes gathered"
        for name in self.realigned:
            yield f"{name} realigned: devices do not end where its words or groups do, which are cut there"


def _spec(value: Any, axis: int | None) -> Any:
    """The spec of an array, one of its axes cut over `MODEL`; of a packed one, the specs of its leaves."""
    if axis is None and isinstance(value, BlockScaledArray):  # a table
        return jax.tree.map(lambda _: PartitionSpec(), value)
    axes: list[str | None] = [None] * value.ndim
    if axis is not None:
        axes[axis] = MODEL
    spec = PartitionSpec(*axes)
    return partition_specs(value, spec) if isinstance(value, BipolarNumbers) else spec


def plan_shards(
    model: Transformer, sizes: Mapping[str, int], *, cut_positions: bool = False, cut_tokens: bool = True
) -> ShardingPlan:
    """The plan for a mesh of these sizes.

    Attention is cut by heads, feed-forward blocks by their width, the output layer by its vocabulary if it has weights
    of its own. What does not divide is padded with zeros where that is exact and leaves each device less than all
    (`shares`); the README says where it is not. All else is whole on every device.

    Args:
      model: packed, not joined, not prepared; or its shapes and dtypes.
      sizes: devices by axis of the mesh.
      cut_positions: whether devices that share a head of keys share the positions of its cache.
      cut_tokens: whether long prompts are cut over devices between products, if all layers of both blocks allow it.

    Raises:
      ValueError: a model whose weights were laid out before; several devices along `MODEL`, and neither attention nor
        feed-forward blocks can be cut; `cut_positions` where as many devices share each head, at least two, is not so.
    """
    parts = sizes.get(MODEL, 1)
    _check_layers(model)
    if parts == 1:
        return ShardingPlan(sizes.get(DATA, 1), 1)
    config, realigned = model.config, []
    queries, kv_heads = shares_of_heads(config.num_heads, config.num_kv_heads, parts)
    rows = queries.times(config.head_dim)
    width = Share.of(config.ffn_size, parts, _unit_of_width(model))
    vocabulary = Share.of(config.vocab_size, parts, 1 if config.vocab_size % parts == 0 else _VOCABULARY_UNIT)
    problems = {
        "attention": _attention_problem(model, queries, parts) or _rows_problem(model, "attention", rows, realigned),
        "feed-forward blocks": _ffn_problem(model, width, parts) or _rows_problem(model, "ffn", width, realigned),
        "output layer": _output_problem(model, vocabulary, parts),
    }
    whole = tuple(f"{name} whole on every device: {problem}" for name, problem in problems.items() if problem)
    if problems["attention"] and problems["feed-forward blocks"]:
        raise ValueError(f"the model cannot be cut over {parts} devices: {'; '.join(whole[:2])}")
    attention, ffn, output = (problem is None for problem in problems.values())
    sharing = parts // config.num_kv_heads if cut_positions else 1
    if cut_positions and (not attention or sharing < 2 or parts % config.num_kv_heads):
        raise ValueError(
            f"positions are cut where attention is, and equally many of {parts} devices, two or more, share each of "
            f"{config.num_kv_heads} heads of keys: leave out cut_positions" + ("" if attention else f"; {whole[0]}")
        )
    return ShardingPlan(
        sizes.get(DATA, 1),
        parts,
        queries if attention else None,
        kv_heads if attention else None,
        width if ffn else None,
        vocabulary if output else None,
        sharing,
        cut_tokens
        and attention
        and ffn
        and all(fuses(layer) for block in BLOCKS for _, layer in _layers(model, block)),
        tuple(realigned),
        whole,
    )


def _check_layers(model: Transformer) -> None:
    for path, layer in nnx.iter_modules(model):
        kernel = layer.kernel.get_value() if isinstance(layer, Linear) else None
        name = "/".join(map(str, path))
        if kernel is not None and not isinstance(kernel, BipolarArray):
            raise ValueError(f"{name} is a {type(kernel).__name__}: cut the model first, which then prepares each part")
        if path and path[-1] in ("qkv_proj", "gate_up_proj"):
            raise ValueError(f"{name} is joined: cut the model before it is prepared, which joins the parts")


def _attention_problem(model: Transformer, queries: Share, parts: int) -> str | None:
    """Why attention cannot be cut into so many parts; None if it can."""
    config = model.config
    if config.positions == "alibi":
        return "the slopes of ALiBi belong to the heads of the whole model"
    if config.sub_norms:
        return "a norm over all heads precedes o"
    if not queries.is_shorter:
        return f"{config.num_heads} heads do not divide over {parts} devices"
    return None


def _ffn_problem(model: Transformer, width: Share, parts: int) -> str | None:
    config = model.config
    if config.experts is not None:
        return "its experts are not cut"
    if config.sub_norms:
        return "a norm over all of the width precedes down"
    rotation = None if config.rotation is None else config.rotation.ffn
    if rotation is not None and rotation.signs is not None:
        return f"the input of down is rotated with random signs, which mixes the numbers of {parts} devices"
    if not width.is_shorter:
        unit = _unit_of_width(model)
        return f"the width {config.ffn_size} does not divide over {parts} devices in multiples of {unit}"
    return None


def _output_problem(model: Transformer, vocabulary: Share, parts: int) -> str | None:
    if model.config.tie_embeddings:
        return "it is the embedding"
    if not vocabulary.is_shorter:
        return f"{vocabulary.total} tokens do not divide over {parts} devices"
    return None


def _unit_of_width(model: Transformer) -> int:
    """Numbers of the feed-forward width that stay together: words and groups of down, and blocks of its rotation."""
    rotation = None if model.config.rotation is None else model.config.rotation.ffn
    units = [WORD_BITS, 1 if rotation is None else rotation.block]
    for name, layer in _layers(model, "ffn"):
        if name == "down_proj" and isinstance(layer, Linear):
            units.append(cut_unit(layer.kernel.get_value()))
    return math.lcm(*units)


def _rows_problem(model: Transformer, block: str, share: Share, realigned: list[str]) -> str | None:
    """Why layers of a block cannot be cut; None if they can.

    Adds the layer whose rows are shared to `realigned` if its words or groups do not end where the shares do.
    """
    name_of_rows = {"attention": "o_proj", "ffn": "down_proj"}[block]
    for name, layer in _layers(model, block):
        if name != name_of_rows:
            if isinstance(layer, Linear) and not is_plain(layer):
                return f"{name} clips its activations as its training did"
            continue
        if not isinstance(layer, Linear) or not is_plain(layer):
            return f"{name} is no packed layer, and sums of floats would depend on the number of devices"
        if layer.order is not None:
            return f"{name} gathers its inputs in the order of their groups, from all devices"
        weights = layer.kernel.get_value()
        if share.is_even and share.size % cut_unit(weights) == 0:
            continue
        group_size = group_size_of_share(weights, share)
        if group_size is not None and weights.contracted_size % weights.group_size:
            return f"{name}: its last group is shorter than {weights.group_size}, k={weights.contracted_size}"
        if group_size is not None and group_size < _SHORTEST_GROUP:
            return f"{name}: groups of {weights.group_size} would be cut into groups of {group_size}"
        if group_size is None and any((share.size - count) % 2 for count in share.counts):
            return f"{name}: padding comes in pairs of rows, and a device would have an odd number of them"
        if group_size is None and share.is_padded and weights.offset is not None and layer.precision.a_bits == 1:
            return f"{name}: tokens of 1 bit have no 0, and its columns have offsets, so padding is not exact"
        if name not in realigned and (share.is_even or group_size not in (None, weights.group_size)):
            realigned.append(name)
    return None


def group_size_of_share(w: BipolarArray, share: Share) -> int | None:
    """The longest groups that end where groups of w and shares of its rows do; None where columns have one scale."""
    if not w.has_integer_groups and w.num_groups == 1:
        return None
    return math.gcd(w.group_size, share.size, *share.starts, *share.counts)


def _layers(model: Transformer, block: str) -> Iterator[tuple[str, nnx.Module]]:
    """The linear layers of a block, of all stacks."""
    for _, stack in model.stacks:
        for path, layer in nnx.iter_modules(getattr(stack, block)):
            if isinstance(layer, Linear | nnx.Linear):
                yield str(path[-1]), layer

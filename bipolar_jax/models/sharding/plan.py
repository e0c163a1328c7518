"""What of a Transformer is cut over the devices of a mesh, what every device has whole, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Linear
from bipolar_jax.nn.layers.linear import is_plain
from bipolar_jax.packing import BipolarArray, BipolarNumbers
from bipolar_jax.packing.cuts import check_contracted_cut, partition_specs

# Axes of the mesh: texts are divided over the first, weights and heads over the second.
DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How a model is cut over `MODEL`; nothing is cut over `DATA` but texts.

    Attributes:
      data, model: devices along each axis.
      attention: whether heads are: q, k and v by columns, o by rows.
      ffn: whether the feed-forward block is: gate and up by columns, down by rows.
      output: whether the output layer is, by columns.
      whole: a sentence for each of these that every device has whole, with the reason.
    """

    data: int
    model: int
    attention: bool
    ffn: bool
    output: bool
    whole: tuple[str, ...]

    def config_of_device(self, config: TransformerConfig) -> TransformerConfig:
        """The shapes of the model that one device runs."""
        heads = self.model if self.attention else 1
        ffn = self.model if self.ffn else 1
        rotation = config.rotation
        if rotation is not None and rotation.ffn is not None and ffn > 1:
            part = dataclasses.replace(rotation.ffn, blocks=rotation.ffn.blocks // ffn)
            rotation = dataclasses.replace(rotation, ffn=part)
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // heads,
            num_kv_heads=max(1, config.num_kv_heads // heads),
            ffn_size=config.ffn_size // ffn,
            rotation=rotation,
        )

    def repeats_kv_heads(self, config: TransformerConfig) -> bool:
        """Whether there are fewer key/value heads than devices, each of which then has the one of its queries."""
        return self.attention and config.num_kv_heads < self.model

    def columns(self, config: TransformerConfig) -> tuple[str, ...]:
        """The layers whose columns are cut."""
        heads = ("q_proj",) if self.repeats_kv_heads(config) else ("q_proj", "k_proj", "v_proj")
        names = heads if self.attention else ()
        names += ("gate_proj", "up_proj") if self.ffn else ()
        return (*names, "lm_head") if self.output else names

    def rows(self) -> tuple[str, ...]:
        """The layers whose rows are cut: their sums are reduced."""
        return (*(("o_proj",) if self.attention else ()), *(("down_proj",) if self.ffn else ()))

    def spec(self, path: tuple[Any, ...], value: Any, config: TransformerConfig) -> Any:
        """The spec of a parameter, or the specs of a packed array's leaves.

        Args:
          path: of the parameter in the model, such as ("layers", "attention", "o_proj", "kernel").
          value: the array, or its shape and dtype.
          config: of the whole model.
        """
        layer, name = (path[-2] if len(path) > 1 else None), path[-1]
        axes = [None] * value.ndim
        if layer in self.columns(config) and name in ("kernel", "bias"):
            axes[-1] = MODEL
        elif layer in self.rows() and name == "kernel":
            axes[-2] = MODEL
        spec = PartitionSpec(*axes)
        return partition_specs(value, spec) if isinstance(value, BipolarNumbers) else spec

    def __str__(self) -> str:
        parts = {"attention": self.attention, "feed-forward blocks": self.ffn, "output layer": self.output}
        cut = ", ".join(name for name, is_cut in parts.items() if is_cut) or "nothing"
        lines = [f"{self.data} x {self.model} devices ({DATA}, {MODEL}); cut over {MODEL}: {cut}"]
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.whole)])


def plan_shards(model: Transformer, sizes: Mapping[str, int]) -> ShardingPlan:
    """The plan for a mesh of these sizes.

    Attention is cut if the heads divide, and those of keys and values divide or are divided; feed-forward blocks if
    their width does; the output layer if it has weights of its own and the vocabulary divides. Rows are cut at ends of
    words and groups. What does not divide is whole on every device.

    Raises:
      ValueError: a model whose weights were laid out before; several devices along `MODEL`, and neither attention nor
        feed-forward blocks can be cut.
    """
    parts = sizes.get(MODEL, 1)
    _check_layers(model)
    if parts == 1:
        return ShardingPlan(sizes.get(DATA, 1), 1, attention=False, ffn=False, output=False, whole=())
    problems = {
        "attention": _attention_problem(model, parts),
        "feed-forward blocks": _ffn_problem(model, parts),
        "output layer": _output_problem(model, parts),
    }
    whole = tuple(f"{name} whole on every device: {problem}" for name, problem in problems.items() if problem)
    if problems["attention"] and problems["feed-forward blocks"]:
        raise ValueError(f"the model cannot be cut over {parts} devices: {'; '.join(whole[:2])}")
    attention, ffn, output = (problem is None for problem in problems.values())
    return ShardingPlan(sizes.get(DATA, 1), parts, attention, ffn, output, whole)


def _check_layers(model: Transformer) -> None:
    for path, layer in nnx.iter_modules(model):
        kernel = layer.kernel.get_value() if isinstance(layer, Linear) else None
        name = "/".join(map(str, path))
        if kernel is not None and not isinstance(kernel, BipolarArray):
            raise ValueError(f"{name} is a {type(kernel).__name__}: cut the model first, which then prepares each part")
        if path and path[-1] in ("qkv_proj", "gate_up_proj"):
            raise ValueError(f"{name} is joined: cut the model before it is prepared, which joins the parts")


def _attention_problem(model: Transformer, parts: int) -> str | None:
    """Why attention cannot be cut into so many parts; None if it can."""
    config = model.config
    if config.positions == "alibi":
        return "the slopes of ALiBi belong to the heads of the whole model"
    if config.sub_norms:
        return "a norm over all heads precedes o"
    if config.num_heads % parts:
        return f"{config.num_heads} heads do not divide over {parts} devices"
    if config.num_kv_heads % parts and parts % config.num_kv_heads:
        return f"{config.num_kv_heads} key/value heads and {parts} devices do not divide each other"
    return _layers_problem(model, "attention", ("o_proj",), parts)


def _ffn_problem(model: Transformer, parts: int) -> str | None:
    config = model.config
    if config.experts is not None:
        return "its experts are not cut"
    if config.sub_norms:
        return "a norm over all of the width precedes down"
    if config.ffn_size % parts:
        return f"the width {config.ffn_size} does not divide over {parts} devices"
    rotation = None if config.rotation is None else config.rotation.ffn
    if rotation is not None and (rotation.signs is not None or rotation.blocks % parts):
        kind = "with random signs" if rotation.signs is not None else f"in {rotation.blocks} blocks of {rotation.block}"
        return f"the input of down is rotated {kind}, which mixes the numbers of {parts} devices"
    return _layers_problem(model, "ffn", ("down_proj",), parts)


def _output_problem(model: Transformer, parts: int) -> str | None:
    if model.config.tie_embeddings:
        return "it is the embedding"
    if model.config.vocab_size % parts:
        return f"{model.config.vocab_size} tokens do not divide over {parts} devices"
    return None


def _layers_problem(model: Transformer, block: str, rows: tuple[str, ...], parts: int) -> str | None:
    """Why layers of a block cannot be cut, `rows` by their rows and the others by their columns."""
    for name, layer in _layers(model, block):
        if name not in rows:
            if isinstance(layer, Linear) and not is_plain(layer):
                return f"{name} clips its activations as its training did"
            continue
        if not isinstance(layer, Linear) or not is_plain(layer):
            return f"{name} is no packed layer, and sums of floats would depend on the number of devices"
        if layer.order is not None:
            return f"{name} gathers its inputs in the order of their groups, from all devices"
        try:
            check_contracted_cut(layer.kernel.get_value(), parts)
        except ValueError as error:
            return f"{name}: {error}"
    return None


def _layers(model: Transformer, block: str) -> Iterator[tuple[str, nnx.Module]]:
    """The linear layers of a block, of all stacks."""
    for _, stack in model.stacks:
        for path, layer in nnx.iter_modules(getattr(stack, block)):
            if isinstance(layer, Linear | nnx.Linear):
                yield str(path[-1]), layer

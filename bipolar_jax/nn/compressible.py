"""What a model says of itself so that `bipolar_jax.compress` can rotate it and calibrate it block by block.

`models.Transformer` implements it for every architecture; any other NNX model can. What always holds:

- `for i in range(num_blocks): carry = run_block(block(i), carry)`, from `enter_blocks(ids)` on, leads to the residual
  stream that the model itself has after its last block.
- `with_blocks([block(i) for i in range(num_blocks)])` is the model itself.
- The layers of a `Sites` have the same input, and `block_sites` are in the order in which the layers run.
- A block adds to the residual stream what its `to_stream` sites put out, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from bipolar_jax.ops import Hadamard


@dataclasses.dataclass(frozen=True)
class Sites:
    """Linear layers of a block that share one input.

    Attributes:
      names: paths of the layers within a block, joined by "/", such as "attention/q_proj".
      to_stream: whether the output is added to the residual stream.
      norm: path of the norm that makes the input of the residual stream; None for other inputs.
      output_norm: path of a norm that the output passes before it is added, or None.
      proportional_to: path of a layer of the block to whose outputs the input is proportional, number by number; a head
        of values, of which there may be fewer, makes as many consecutive heads of the input. None for other inputs.
      experts: whether they are stacks of layers with a leading axis of experts, which `nn.layers.experts.run_experts`
        runs for the tokens that go to each.
    """

    names: tuple[str, ...]
    to_stream: bool
    norm: str | None = None
    output_norm: str | None = None
    proportional_to: str | None = None
    experts: bool = False

    @property
    def adds_to_stream(self) -> bool:
        """Whether the output is added to the residual stream as it is, whose size then says how much errors matter."""
        return self.to_stream and self.output_norm is None


@dataclasses.dataclass(frozen=True)
class ValueHeads:
    """Heads of values, which attention weighs and adds, head by head.

    Attributes:
      value: path of the layer that makes them, within a block.
      output: path of the layer that reads their sums: one head for each head of queries.
      size: numbers of a head.
    """

    value: str
    output: str
    size: int


@dataclasses.dataclass(frozen=True)
class StreamEnds:
    """Where the residual stream begins and ends.

    Attributes:
      tables: paths of the embeddings whose rows are added to begin it.
      enters_as_is: whether that sum is the input of the first block, and not of a norm before it.
      norm: path of the last norm.
      output: path of the layer that makes logits of the norm's output; None if the first of the tables does.
    """

    tables: tuple[str, ...]
    enters_as_is: bool
    norm: str
    output: str | None


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The basis that a model's weights are in, and the rotations that it computes at run time.

    Attributes:
      stream: of the residual stream that blocks read and add to: blocks then read it through RMSNorms, because no other
        norm is the same in every basis. Where the model has LayerNorms, its mean is taken out, too. None leaves it.
      enters: whether embeddings are rotated, and freed of their mean, at run time; False if their tables are.
      leaves: whether the stream is rotated back at run time before the last norm; False if the output layer's weights
        are rotated.
      ffn: of the input of a feed-forward block's last layer, at run time; None leaves it.
      keys: of each head of queries and keys where keys are cached in 4 bits, at run time; None leaves them.

    Raises:
      ValueError: a field of another type, or ends of a stream that is not rotated.
    """

    stream: Hadamard | None = None
    enters: bool = False
    leaves: bool = False
    ffn: Hadamard | None = None
    keys: Hadamard | None = None

    def __post_init__(self):
        for name in ("stream", "ffn", "keys"):
            if not isinstance(getattr(self, name), Hadamard | None):
                raise ValueError(f"rotation.{name} must be a Hadamard or None, got {getattr(self, name)!r:.60}")
        for name in ("enters", "leaves"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"rotation.{name} must be True or False, got {getattr(self, name)!r:.40}")
        if self.stream is None and (self.enters or self.leaves):
            raise ValueError("a stream that is not rotated has no rotation where it enters or leaves")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`. Raises ValueError or TypeError for other fields."""
        if not isinstance(fields, dict):
            raise ValueError(f"rotation is a {type(fields).__name__}, expected an object")
        parts = {name: fields.get(name) for name in ("stream", "ffn", "keys")}
        return cls(**{**fields, **{name: Hadamard(**part) if part else None for name, part in parts.items()}})


@runtime_checkable
class Compressible(Protocol):
    """A model whose residual stream passes through blocks of the same layers.

    Attributes:
      block_sites: linear layers of a block, the same for every block; blocks may differ in how they are packed.
      num_blocks: number of blocks.
    """

    @property
    def block_sites(self) -> tuple[Sites, ...]: ...

    @property
    def num_blocks(self) -> int: ...

    def block(self, index: int) -> nnx.Module:
        """A block by itself, with float or packed layers; its arrays are copies of the model's."""

    def with_blocks(self, blocks: Sequence[nnx.Module]) -> Self:
        """A new model with these blocks, whose layers may be packed; everything else is shared with this model.

        Raises:
          ValueError: another number of blocks.
        """

    def check_ids(self, ids: Int[np.ndarray | Array, "batch length"]) -> None:
        """Raises ValueError for windows that the model cannot read: too long ones, or ids outside its vocabulary."""

    def enter_blocks(self, ids: Int[Array, "batch length"]) -> Any:
        """The carry of the first block: a pytree of the residual stream and of what all blocks need, such as tables."""

    def run_block(self, block: nnx.Module, carry: Any) -> Any:
        """The carry of the next block; for `jax.jit` one program serves all blocks of equal structure."""

    def stream(self, carry: Any) -> Float[Array, "batch length hidden"]:
        """The residual stream in a carry."""


@runtime_checkable
class Predictive(Compressible, Protocol):
    """A compressible language model."""

    def predict(self, carry: Any) -> Float[Array, "batch length vocab"]:
        """Logits of every position's next token, from what the last block leaves; float32."""


@runtime_checkable
class CachesHeads(Compressible, Protocol):
    """A compressible model that can attend to keys and values as a cache of few bits keeps them.

    Attributes:
      cached_bits: numbers of bits that its cache can have.
    """

    cached_bits: tuple[int, ...]

    def enter_blocks(self, ids: Int[Array, "batch length"], cache_bits: int | None = None) -> Any:
        """`Compressible.enter_blocks`; the blocks then round keys and values to so many bits."""


@runtime_checkable
class Rotatable(Compressible, Protocol):
    """A compressible model whose weights can take other bases.

    Attributes:
      stream_ends: where the residual stream begins and ends.
      value_heads: the heads of values, or None if a block has none.
      inner: path, within a block, of the layer whose input `Rotation.ffn` rotates; None if there is none.
      rotation: the bases that its weights are in, or None.
    """

    @property
    def stream_ends(self) -> StreamEnds: ...

    @property
    def value_heads(self) -> ValueHeads | None: ...

    @property
    def inner(self) -> str | None: ...

    @property
    def rotation(self) -> Rotation | None: ...

    def with_rotation(self, rotation: Rotation) -> Self:
        """The model with these rotations at run time and RMSNorms with the same gains in its blocks.

        It shares all weights with this model, which are not rotated yet. The config says it, so that files do.
        """


@runtime_checkable
class Layered(Protocol):
    """A model whose decoder layers are stacked: each run of consecutive equal layers is one stack, which is scanned.

    With one run, the parameters of all layers have paths such as "layers/ffn/down_proj"; with several, those of a run
    have "layers/0-4/ffn/down_proj" (`run_name`). Rules may say "layers/3/ffn/down_proj", of one layer, too: then
    `quantize_model` cuts the stacks where layers begin to differ.

    Attributes:
      stack: attribute of the model that holds the layers, such as "layers".
      runs: the layers of each stack, in order.
    """

    stack: str

    @property
    def runs(self) -> tuple[range, ...]: ...

    def with_runs(self, runs: Sequence[range]) -> Self:
        """The model with its stacks cut into these runs; the numbers stay the same.

        Raises:
          ValueError: runs that do not have all layers in order, or that would join layers of several runs.
        """


def run_name(layers: range) -> str:
    """The name of a run in paths: its first and last layer, as in "0-4"; or "7" for one layer."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def run_of_name(name: str) -> range:
    """Inverse of `run_name`. Raises ValueError for other texts."""
    first, _, last = name.partition("-")
    return range(int(first), int(last or first) + 1)


def layer_at(module: nnx.Module, path: str) -> nnx.Module:
    """The submodule at a path such as "attention/q_proj", or "layers/0" in a list.

    Raises:
      ValueError: no such submodule.
    """
    for name in path.split("/"):
        if isinstance(module, nnx.List | list | tuple) and name.isdecimal() and int(name) < len(module):
            module = module[int(name)]
        elif isinstance(module, dict) and (keys := [key for key in module if str(key) == name]):
            module = module[keys[0]]
        elif hasattr(module, name):
            module = getattr(module, name)
        else:
            raise ValueError(f"{type(module).__name__} has no {name!r}, of the path {path!r}")
    return module


def without_signs[Model](model: Model) -> tuple[Model, Int8[np.ndarray, " hidden"] | None]:
    """The model without random signs in the rotation of its residual stream; and the signs, or None.

    The signs' seed is static, so that every other seed would compile a model's programs anew. Programs take both
    results and put them together by `with_signs`. What blocks compute does not depend on the signs.
    """
    if not isinstance(model, Rotatable) or model.rotation is None or model.rotation.stream is None:
        return model, None
    stream = model.rotation.stream
    return _with_stream(model, dataclasses.replace(stream, signs=None)), stream.drawn_signs()


def with_signs[Model](model: Model, signs: Int8[Array, " hidden"] | None) -> Model:
    """The model of `without_signs` as it was, within a compiled program."""
    return model if signs is None else _with_stream(model, dataclasses.replace(model.rotation.stream, signs=signs))


def _with_stream(model: Rotatable, stream: Hadamard) -> Rotatable:
    return model.with_rotation(dataclasses.replace(model.rotation, stream=stream))

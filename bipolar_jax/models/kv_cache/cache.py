"""The cache: keys and values of the tokens read so far, of all layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.models.kv_cache.cut_positions import CutPositions
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads

# Keys or values, in the model's dtype or in bipolar-INT: a vector for each head and token; the tokens of a head are
# contiguous.
Kept = Float[Array, "*layers batch kv_heads length head_dim"] | QuantizedHeads


def row_major(x: Array) -> Array:
    """The same array, constrained to row-major layout: XLA for GPUs chooses other layouts and copies whole caches."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def keep(heads: Float[Array, "*layers batch length kv_heads head_dim"], bits: int | None) -> Kept:
    """Keys or values in the form in which a cache stores them.

    Args:
      heads: of one layer, or of all.
      bits: 8 or 4; None keeps the dtype.

    Raises:
      ValueError: other bits, or an odd head_dim with 4.
    """
    heads = jnp.swapaxes(heads, -3, -2)
    return heads if bits is None else QuantizedHeads.quantize(heads, bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and the number of tokens of each sequence.

    Positions from `lengths` on hold padding, which the attention mask hides until `decode` overwrites it: prompts of
    different lengths share a batch.

    Attributes:
      keys, values: [layers, batch, kv_heads, capacity, head_dim], floats or `QuantizedHeads`.
      lengths: tokens of each sequence.
      key_rotation: the basis that keys are kept in, in which they lose less to rounding; queries have to be rotated
        likewise. None keeps them as they are.
      cut: how devices share the positions, of which each has `cut.slots`; `write_all` takes no such cache. None where
        positions are not shared.
    """

    keys: Kept
    values: Kept
    lengths: Int[Array, " batch"]
    key_rotation: Hadamard | None = dataclasses.field(default=None, metadata={"static": True})
    cut: CutPositions | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        dtype: jnp.dtype,
        bits: int | None,
        lengths: Int[Array, " batch"],
        key_rotation: Hadamard | None = None,
        cut: CutPositions | None = None,
    ) -> KVCache:
        """A cache of uninitialized numbers; `write_prompts` must fill every layer.

        Args:
          shape: layers, batch, kv_heads, capacity, head_dim; a cut cache has a device's slots of the capacity.
          dtype: of the heads.
          bits: 8 or 4; None keeps the dtype.
          lengths: tokens of each sequence.
          key_rotation: the basis that keys are kept in.
          cut: how devices share the positions.

        Raises:
          ValueError: other bits, or an odd head_dim with 4.
        """

        layers, batch, kv_heads, capacity, head_dim = shape
        slots = capacity if cut is None else cut.slots

        def heads():
            numbers = jnp.zeros((layers, batch, kv_heads, slots, head_dim), dtype)
            return numbers if bits is None else QuantizedHeads.quantize(numbers, bits)

        def room():
            return jax.tree.map(lambda leaf: row_major(jax.lax.empty(leaf.shape, leaf.dtype)), jax.eval_shape(heads))

        return cls(room(), room(), lengths, key_rotation, cut)

    @property
    def capacity(self) -> int:
        return _positions(self.keys) if self.cut is None else self.cut.capacity

    @property
    def kv_heads(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[2]

    @property
    def bits(self) -> int | None:
        """Bits of a cached number; None for floats."""
        return self.keys.bits if isinstance(self.keys, QuantizedHeads) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: floats, or codes, scales and zeros; and the lengths."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def rotate(self, heads: Float[Array, "*layers batch length _ head_dim"]) -> Float[Array, "..."]:
        """Queries or keys in the basis of the kept keys."""
        return heads if self.key_rotation is None else self.key_rotation.rotate(heads)

    def write_prompts(
        self,
        layer: Int[Array, ""],
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads head_dim"],
    ) -> KVCache:
        """Fills a layer: the first `length` positions of every sequence, then zeros; in place if the cache is donated.

        Raises:
          ValueError: more positions than the cache has.
        """
        if keys.shape[1] > self.capacity:
            raise ValueError(
                f"a cache of capacity={self.capacity} positions cannot hold prompts padded to {keys.shape[1]} tokens"
            )

        def put(rows, prompts):
            filler = [(0, rows.shape[axis + 1] - size) for axis, size in enumerate(prompts.shape)]
            filled = jnp.pad(prompts, filler)[None]
            return row_major(
                jax.lax.dynamic_update_slice(rows, filled, (layer, *[jnp.zeros_like(layer)] * prompts.ndim))
            )

        # Otherwise XLA computes them in the order of the cache, and transposes them for attention.
        keys, values = row_major(keys), row_major(values)
        if self.cut is not None:
            keys, values = self.cut.taken(keys), self.cut.taken(values)
        kept = keep(self.rotate(keys), self.bits), keep(values, self.bits)
        keys, values = jax.tree.map(put, (self.keys, self.values), kept)
        return dataclasses.replace(self, keys=keys, values=values)

    def write(
        self,
        layer: Int[Array, ""],
        keys: Float[Array, "batch 1 kv_heads head_dim"],
        values: Float[Array, "batch 1 kv_heads head_dim"],
    ) -> KVCache:
        """Writes one token of each sequence at its next free position.

        A sequence that fills the cache is left unchanged: sizes are fixed under jit, so the caller must stop at
        `capacity`, as `generation` does.
        """
        batch, _, kv_heads, _ = keys.shape
        sequence, head = (jnp.arange(size, dtype=jnp.int32) for size in (batch, kv_heads))
        slots = self.lengths if self.cut is None else self.cut.slot(self.lengths)
        at = (jnp.asarray(layer)[None, None], sequence[:, None], head[None], slots[:, None])

        def put(rows, token):
            token = token[:, :, 0].astype(rows.dtype)
            return row_major(rows.at[at].set(token, unique_indices=True, indices_are_sorted=True, mode="drop"))

        kept = keep(self.rotate(keys), self.bits), keep(values, self.bits)
        keys, values = jax.tree.map(put, (self.keys, self.values), kept)
        return dataclasses.replace(self, keys=keys, values=values)

    def write_all(
        self,
        keys: Float[Array, "layers batch 1 kv_heads head_dim"],
        values: Float[Array, "layers batch 1 kv_heads head_dim"],
        first_layer: int = 0,
    ) -> KVCache:
        """`write` for consecutive layers at once."""
        layers, batch, _, kv_heads, _ = keys.shape

        def scatter(rows, token):
            layer, sequence, head = (jnp.arange(size, dtype=jnp.int32) for size in (layers, batch, kv_heads))
            layer, position = first_layer + layer[:, None, None], self.lengths[None, :, None]
            at = (layer, sequence[None, :, None], head[None, None], position)
            token = token[:, :, :, 0].astype(rows.dtype)
            return row_major(rows.at[at].set(token, unique_indices=True, indices_are_sorted=True, mode="drop"))

        def put(rows, token):
            zero = jnp.zeros_like(self.lengths[0])
            at = (zero + first_layer, zero, zero, self.lengths[0], zero)[: rows.ndim]
            before = jax.lax.dynamic_slice(rows, at, token.shape)
            token = jnp.where(self.lengths[0] < self.capacity, token.astype(rows.dtype), before)
            return row_major(jax.lax.dynamic_update_slice(rows, token, at))

        kept = keep(self.rotate(keys), self.bits), keep(values, self.bits)
        keys, values = jax.tree.map(put if batch == 1 else scatter, (self.keys, self.values), kept)
        return dataclasses.replace(self, keys=keys, values=values)

    def read(self, layer: Int[Array, ""]) -> tuple[Kept, Kept]:
        """Keys and values of one layer, each [batch, kv_heads, capacity, head_dim]."""
        return jax.tree.map(lambda leaf: leaf[layer], (self.keys, self.values))

    def advance(self) -> KVCache:
        """Counts the token that all layers have written."""
        return dataclasses.replace(self, lengths=self.lengths + 1)


def _positions(kept: Kept) -> int:
    """The capacity of keys or values of all layers."""
    return (kept.codes if isinstance(kept, QuantizedHeads) else kept).shape[3]


def numbers_of(kept: Kept) -> Float[Array, "*layers batch kv_heads length head_dim"]:
    """The numbers in float32; XLA fuses the conversion into the kernel that reads them."""
    return kept.dequantize() if isinstance(kept, QuantizedHeads) else kept.astype(jnp.float32)

"""Keys and values of the tokens read so far."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and how many positions of each sequence hold a token.

    Positions from `lengths` on hold padding; `decode` overwrites them one by one,
    and until then the mask hides them, so prompts of different lengths share a batch.
    """

    keys: Float[Array, "layers batch capacity kv_heads head_dim"]
    values: Float[Array, "layers batch capacity kv_heads head_dim"]
    lengths: Int[Array, " batch"]

    @classmethod
    def from_prefill(
        cls,
        keys: Float[Array, "layers batch length kv_heads head_dim"],
        values: Float[Array, "layers batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"],
        capacity: int,
    ) -> KVCache:
        """Takes over what prefill computed and leaves room up to `capacity` positions.

        Raises:
          ValueError: the prompts are longer than `capacity`.
        """
        length = keys.shape[2]
        if capacity < length:
            raise ValueError(f"a cache of {capacity=} positions cannot hold prompts padded to {length} tokens")
        room = ((0, 0), (0, 0), (0, capacity - length), (0, 0), (0, 0))
        return cls(jnp.pad(keys, room), jnp.pad(values, room), lengths)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def write(
        self,
        layer: Int[Array, ""],
        keys: Float[Array, "batch 1 kv_heads head_dim"],
        values: Float[Array, "batch 1 kv_heads head_dim"],
    ) -> KVCache:
        """Stores one token of each sequence at its next free position.

        A sequence that already fills the cache keeps what it has: sizes are fixed under jit,
        so it is for the caller to stop at `capacity`, as `generation` does.
        """
        rows = jnp.arange(self.lengths.shape[0])
        at = (layer, rows, self.lengths)
        return dataclasses.replace(
            self, keys=self.keys.at[at].set(keys[:, 0]), values=self.values.at[at].set(values[:, 0])
        )

    def read(self, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """Keys and values of one layer, each [batch, capacity, kv_heads, head_dim]."""
        return self.keys[layer], self.values[layer]

    def mask(self) -> Bool[Array, "batch 1 1 capacity"]:
        """What the token being decoded may see: all before it, and itself."""
        return (jnp.arange(self.capacity) <= self.lengths[:, None])[:, None, None, :]

    def advance(self) -> KVCache:
        """Counts the token that every layer has now written."""
        return dataclasses.replace(self, lengths=self.lengths + 1)

"""One token of each sequence enters the cache and attends to it: against float64 and the cache's own functions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bipolar_jax.models.blocks.alibi import alibi_slopes
from bipolar_jax.models.blocks.rope import rotate
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import generator
from tests.gpu.trial import Case, Trial, one_program

SM90 = BACKENDS["sm90"]

_LAYERS, _LAYER = 2, 1


@dataclasses.dataclass(frozen=True)
class Token:
    """One call; `lengths` are the positions of the sequences' tokens."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    bits: int | None = None
    dtype: type = ml_dtypes.bfloat16
    rope: bool = True
    alibi: bool = False

    @property
    def name(self) -> str:
        options = [f"{self.bits} bits"] * (self.bits is not None) + ["alibi"] * self.alibi + ["rope"] * self.rope
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return ", ".join([f"at {self.lengths} in {self.capacity}", heads, np.dtype(self.dtype).name, *options])

    def trial(self) -> Trial:
        rng, batch = generator(*self.lengths, self.heads), len(self.lengths)

        def normal(*shape):
            return rng.standard_normal(shape).astype(self.dtype)

        token = tuple(normal(batch, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads))
        angles = rng.standard_normal((batch, self.head_dim // 2)).astype(np.float32)
        tables = (np.cos(angles), np.sin(angles)) if self.rope else None
        slopes = np.asarray(alibi_slopes(self.heads), np.float32) if self.alibi else None
        lengths = np.asarray(self.lengths, np.int32)
        with jax.default_device(jax.devices("cpu")[0]):
            kept = [jnp.asarray(normal(_LAYERS, batch, self.kv_heads, self.capacity, self.head_dim)) for _ in "kv"]
            if self.bits is not None:
                kept = [jax.jit(QuantizedHeads.quantize, static_argnums=1)(heads, self.bits) for heads in kept]
            before = KVCache(*kept, jnp.asarray(lengths))
            q, k, v = (jnp.asarray(heads)[:, None] for heads in token)
            if tables is not None:
                wide = tuple(table[:, None] for table in tables)
                q, k = rotate(q, wide), rotate(k, wide)
            written = jax.device_get(before.write(_LAYER, k, v))
        before, q = jax.device_get(before), np.asarray(q[:, 0], np.float64)
        keys, values = (tuple(jax.tree.leaves(kept)) for kept in (before.keys, before.values))

        def attend(token, keys, values, layer, lengths, tables, slopes):
            return SM90.decode_attention(
                token, keys, values, layer, lengths, bits=self.bits, tables=tables, slopes=slopes
            )

        def check(found):
            context, *after = found
            for got, wanted in zip(
                jax.tree.leaves(after), jax.tree.leaves((written.keys, written.values)), strict=True
            ):
                self._check_written(got, wanted, lengths)
            precision = float(ml_dtypes.finfo(self.dtype).eps)
            expected = self._attended(q, *after, slopes)
            np.testing.assert_allclose(
                np.asarray(context, np.float64), expected, rtol=2 * precision, atol=max(precision, 5e-6)
            )

        return one_program(attend, (token, keys, values, np.int32(_LAYER), lengths, tables, slopes), check)

    def _check_written(self, got, wanted, lengths) -> None:
        """All but the token is untouched; the token is rotated and quantized by other instructions."""
        new = np.zeros(wanted.shape[:4], bool)
        for row, length in enumerate(lengths):
            if length < self.capacity:
                new[_LAYER, row, :, length] = True
        np.testing.assert_array_equal(got[~new], wanted[~new])
        got, wide = np.asarray(got[new], np.float64), np.asarray(wanted[new], np.float64)
        if np.issubdtype(wanted.dtype, np.integer):
            if self.bits == 4 and wanted.ndim == 5:  # two codes a byte
                got, wide = (np.concatenate([x % 16, x // 16], axis=-1) for x in (got, wide))
            assert np.abs(got - wide).max(initial=0) <= 1, "codes in the cache are more than one apart"
            assert np.mean(got != wide) < 0.02, f"{np.mean(got != wide):.1%} of the token's codes differ"
        else:
            limit = 4 * float(ml_dtypes.finfo(self.dtype).eps)
            np.testing.assert_allclose(got, wide, rtol=0, atol=limit * np.abs(wide).max(initial=0))

    def _attended(self, q, keys, values, slopes) -> np.ndarray:
        """In float64, over the cache that the kernel has written."""
        keys, values = self._numbers(keys), self._numbers(values)
        out = np.empty(q.shape)
        for row, head in np.ndindex(len(self.lengths), self.heads):
            seen, shared = min(self.lengths[row] + 1, self.capacity), head * self.kv_heads // self.heads
            scores = keys[row, shared, :seen] @ q[row, head] / np.sqrt(self.head_dim)
            if slopes is not None:
                scores += float(slopes[head]) * np.arange(seen)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[row, shared, :seen] / weights.sum()
        return out

    def _numbers(self, kept: tuple[np.ndarray, ...]) -> np.ndarray:
        """Keys or values of the layer, float64 [batch, kv_heads, capacity, head_dim]."""
        leaves = [leaf[_LAYER] for leaf in kept]
        if self.bits is None:
            return np.asarray(leaves[0], np.float64)
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(QuantizedHeads(*map(jnp.asarray, leaves), self.bits).dequantize(), np.float64)


def cases() -> list[Case]:
    half, single = np.float16, np.float32
    tokens = [
        Token((0, 1, 63, 64, 130, 191), 4, 4, 64, 192, bits, dtype)
        for bits, dtype in ((None, single), (None, half), (8, single), (4, ml_dtypes.bfloat16))
    ]
    for bits in (None, 8, 4):
        tokens += [
            Token((100,), 32, 8, 128, 320, bits),
            Token((1087,), 32, 32, 128, 1088, bits),
            Token((640, 3, 1000), 28, 4, 128, 1024, bits),
            Token((128, 127), 9, 3, 64, 128, bits, half),
            Token((300, 20), 32, 32, 128, 320, bits, rope=False, alibi=True),
            Token((50, 0, 319), 8, 4, 256, 320, bits),
            Token((70,) * 64, 8, 2, 128, 128, bits),
            Token((0, 31, 64, 65, 100, 128, 257, 300, 319, 320), 32, 32, 128, 320, bits),  # two texts a block
            Token((0, 31, 64, 65, 257, 300, 319, 320), 64, 32, 128, 320, bits),  # the same, floats by two warpgroups
            Token((90,), 64, 8, 128, 128, bits),
        ]
    tokens += [Token((575,), 1, 1, 16, 576), Token((50,), 4, 2, 96, 64, 4), Token((50,), 4, 2, 80, 64)]
    return [Case(token.name, token.trial) for token in tokens]


def small() -> dict[str, Case]:
    tokens = {
        "attention": Token((0, 63), 2, 1, 32, 64, None, np.float32),
        # By two warpgroups a block: 64 blocks, each of a head.
        "attention, tiles": Token((0, 5, 20, 31, 40, 60, 63, 64), 8, 8, 128, 64),
        "attention, 4 bits": Token((50,), 2, 1, 32, 64, 4, np.float32, rope=False, alibi=True),
    }
    return {name: Case(name, token.trial) for name, token in tokens.items()}

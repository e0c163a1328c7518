"""Workloads of the language model benchmark, and a model compiled for one: its check, timings and memory."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.sharding.sharded_transformer import ShardedTransformer
from bipolar_jax.models.transformer import Transformer
from experiments.distributed.collectives import collectives
from experiments.support.device_lock import device_alone, device_shared, device_unlocked
from experiments.support.timing import Timing

_LENGTH_STEP = 64  # cache capacity is a multiple of attention's step over positions
_WORKLOAD = re.compile(r"(\d+)x(\d+)\+(\d+)")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch of prompts of one length, and the number of tokens to generate.

    Attributes:
      batch: number of prompts.
      prompt: tokens per prompt.
      new_tokens: decode steps.
    """

    batch: int
    prompt: int
    new_tokens: int

    @property
    def name(self) -> str:
        """Its notation in configs: "8x512+128"."""
        return f"{self.batch}x{self.prompt}+{self.new_tokens}"

    @property
    def capacity(self) -> int:
        """Positions of the cache, rounded up as in `generate`."""
        return -(-(self.prompt + self.new_tokens) // _LENGTH_STEP) * _LENGTH_STEP


def parse_workloads(text: str, context_length: int) -> list[Workload]:
    """Reads "1x512+128,8x512+128": batch x prompt + new tokens, without duplicates.

    Raises:
      ValueError: other notation, a size of zero, a prompt of one token, or more tokens than the model's context.
    """
    workloads = {}
    for item in text.split(","):
        match = _WORKLOAD.fullmatch(item.strip())
        if not match:
            raise ValueError(f"workload {item!r} is not of the form 8x512+128: batch x prompt + new tokens")
        workload = Workload(*map(int, match.groups()))
        if not workload.batch or not workload.new_tokens or workload.prompt < 2:
            raise ValueError(f"workload {item!r} needs a batch and new tokens of at least 1, and a prompt of 2")
        if workload.prompt + workload.new_tokens > context_length:
            raise ValueError(f"workload {item!r} exceeds the model's context of {context_length} tokens")
        workloads[workload.name] = workload
    return list(workloads.values())


class CompiledWorkload:
    """A model's prefill and decode loop, compiled for one workload.

    The decode loop is one call on the device, which decodes `new_tokens` steps greedily; the cache is donated to it.
    """

    def __init__(
        self,
        model: Transformer | ShardedTransformer,
        workload: Workload,
        *,
        cache_bits: int | None = None,
        options: dict[str, Any] | None = None,
        alone: bool = False,
        seed: int = 0,
    ):
        """Compiles both functions.

        Args:
          model: the model.
          workload: batch, prompt length and decode steps.
          cache_bits: see `Transformer.prefill`.
          options: XLA compiler options.
          alone: whether nobody else may compile meanwhile: XLA times the float products of a model on the device.
          seed: seed of the random prompts.
        """
        self.model, self.workload = model, workload
        rng = np.random.default_rng(seed)
        shape = workload.batch, workload.prompt
        self.ids = jnp.asarray(rng.integers(0, model.config.vocab_size, shape), jnp.int32)
        self.lengths = jnp.full(workload.batch, workload.prompt, jnp.int32)

        def prefill(model, ids, lengths):
            logits, cache = model.prefill(ids, lengths, workload.capacity, cache_bits)
            return jnp.max(logits, axis=-1), cache

        def decode(model, tokens, cache):
            def step(carry, _):
                logits, cache = model.decode(*carry)
                return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), jnp.max(logits, axis=-1)

            (_, cache), largest = jax.lax.scan(step, (tokens, cache), length=workload.new_tokens)
            return largest, cache

        with device_unlocked():
            lowered_prefill = jax.jit(prefill).lower(model, self.ids, self.lengths)
            _, cache = jax.eval_shape(prefill, model, self.ids, self.lengths)
        locked = device_alone if alone else device_shared
        with locked():
            self._prefill = lowered_prefill.compile(options)
        if isinstance(model, ShardedTransformer):  # the decode loop takes the cache as the prompts leave it
            cache = jax.tree.map(_placed, cache, self._prefill.output_shardings[1])
        with device_unlocked():
            lowered_decode = jax.jit(decode, donate_argnums=2).lower(model, self.lengths, cache)
        self.cache_bytes = cache.nbytes
        with locked():
            self._decode = lowered_decode.compile(options)

    def check(self) -> float:
        """Compares the logits after the last prompt token from prefill with those from a decode step.

        Both are equal in exact arithmetic, but use different kernels. There is no tolerance: low-bit activations
        amplify a rounding difference to a whole quantization step, so the expected error depends on the precision.

        Returns:
          Largest difference of each prompt's largest logit, relative to the largest of them.

        Raises:
          ValueError: logits are not finite.
        """
        prefilled, _ = self._prefill(self.model, self.ids, self.lengths)
        _, cache = self._prefill(self.model, self.ids, self.lengths - 1)
        decoded, _ = self._decode(self.model, self.ids[:, -1], cache)
        prefilled, decoded = np.asarray(prefilled, np.float64), np.asarray(decoded, np.float64)
        for name, logits in (("prefill", prefilled), ("decoding", decoded)):
            if not np.isfinite(logits).all():
                raise ValueError(f"{name} gives logits that are not finite")
        return float(np.abs(decoded[0] - prefilled).max() / np.abs(prefilled).max())

    def time_prefill(self, iterations: int) -> Timing:
        """Wall time of one prefill."""
        microseconds = []
        for _ in range(iterations + 1):  # the first warms up
            started = time.perf_counter()
            jax.block_until_ready(self._prefill(self.model, self.ids, self.lengths))
            microseconds.append(1e6 * (time.perf_counter() - started))
        return Timing.of(microseconds[1:], "wall")

    def time_decode(self, iterations: int) -> Timing:
        """Wall time of the decode loop, divided by its steps."""
        _, cache = self._prefill(self.model, self.ids, self.lengths)
        last = jax.block_until_ready(self.ids[:, -1])
        microseconds = []
        for _ in range(iterations + 1):
            cache = jax.block_until_ready(self._rewound(cache))
            started = time.perf_counter()
            _, cache = jax.block_until_ready(self._decode(self.model, last, cache))
            microseconds.append(1e6 * (time.perf_counter() - started))
        return Timing.of(microseconds[1:], "wall").divided(self.workload.new_tokens)

    def profiled_calls(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """For the profiler: (blocking function to call once, number of its steps) of "prefill" and "decode"."""
        _, cache = self._prefill(self.model, self.ids, self.lengths)
        cache = jax.block_until_ready(self._rewound(cache))
        last = jax.block_until_ready(self.ids[:, -1])
        return {
            "prefill": (lambda: jax.block_until_ready(self._prefill(self.model, self.ids, self.lengths)), 1),
            "decode": (lambda: jax.block_until_ready(self._decode(self.model, last, cache)), self.workload.new_tokens),
        }

    def collectives(self) -> dict[str, list[str]]:
        """What devices exchange in "prefill" and "decode": kind and shapes of each operation, in a loop once."""
        programs = {"prefill": self._prefill, "decode": self._decode}
        return {name: [" ".join(each) for each in collectives(program)] for name, program in programs.items()}

    def memory(self) -> dict[str, int]:
        """Bytes of all weights, of the weights that a decode step reads, of the cache, and of XLA's temporaries."""
        return {
            "weight_bytes": _nbytes(self.model),
            "read_bytes": read_bytes(self.model),
            "cache_bytes": self.cache_bytes,
            "prefill_temporary_bytes": self._prefill.memory_analysis().temp_size_in_bytes,
            "decode_temporary_bytes": self._decode.memory_analysis().temp_size_in_bytes,
        }

    def _rewound(self, cache: KVCache) -> KVCache:
        """The cache with all prompt tokens but the last, which the decode loop reads first."""
        return dataclasses.replace(cache, lengths=self.lengths - 1)


def read_bytes(model: Transformer | ShardedTransformer) -> int:
    """Bytes of the weights that a decode step reads, on all devices; excludes tables of which it reads single rows."""
    tables = {"positions"} | (set() if model.config.tie_embeddings else {"embed"})
    flat = nnx.to_flat_state(model.state if isinstance(model, ShardedTransformer) else nnx.state(model))
    return sum(_nbytes(variable) for path, variable in flat if path[0] not in tables)


def peak_bytes() -> int | None:
    """Peak device memory of this process, or None if JAX does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

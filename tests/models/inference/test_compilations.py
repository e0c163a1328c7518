"""What generation compiles, and when; and its loop in 64 bits. The model has no layers, so that programs are small."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import threading
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from bipolar_jax.kernels.sm90.core import kernel_programs
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference import decode_loop, generation
from bipolar_jax.models.inference.generation import generate, stream
from bipolar_jax.models.inference.sampling import Sampling
from bipolar_jax.ops import compiled
from bipolar_jax.ops.compiled import compile_together

CONFIG = TransformerConfig(
    vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, context_length=72
)
PROMPTS = [[1, 2, 3], [30, 4, 36, 0, 7, 7, 9], [5]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Waves:
    """A model without layers: logits are a function of the last token."""

    config: TransformerConfig = CONFIG

    def prefill(self, ids, lengths, capacity, cache_bits):
        return self._logits(jnp.take_along_axis(ids, lengths[:, None] - 1, axis=1)), lengths

    def decode(self, ids, cache):
        return self._logits(ids[:, None]), cache

    def _logits(self, ids):
        return 3 * jnp.sin(7 * ids.astype(jnp.float32) + jnp.arange(CONFIG.vocab_size, dtype=jnp.float32)[None])


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the functions that JAX compiles meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)


def test_all_sampling_settings_and_end_ids_share_two_compilations_before_the_first_token(monkeypatch):
    for program in (decode_loop.first_token, decode_loop.next_tokens):
        program.clear_cache()
    decode_loop._compile_both.cache_clear()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, compilations() as found, pytest.raises(KeyboardInterrupt):
        patch.setattr(generation, "first_token", interrupt)
        generate(Waves(), PROMPTS[:1], 4, Sampling(0.5), jax.random.key(0))
    assert sum("token" in name for name in found) == 2
    with compilations() as found:
        generate(Waves(), PROMPTS[:1], 4, Sampling(0.5), jax.random.key(0))
        for temperature in (0.7, 1, 3.5):
            generate(Waves(), PROMPTS[:1], 4, key=jax.random.PRNGKey(1), temperature=temperature)
        generate(Waves(), PROMPTS[:1], 5, Sampling(0.9, top_k=5, top_p=0.8), jax.random.key(2))
        list(stream(Waves(), PROMPTS[:1], 3, Sampling(1.1, top_p=0.7), jax.random.key(3)))
        generate(Waves(), PROMPTS[:1], 4, key=jax.random.key(0), temperature=0.5, end_ids=(3, 4))
    assert [name for name in found if "token" in name] == []


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_k=5, top_p=0.9), Sampling(1.0, repetition_penalty=1.3)], ids=str
)
@pytest.mark.sample(2)
def test_loop_and_sampling_work_in_64_bits(sampling):
    with jax.enable_x64(True):
        found = generate(Waves(), PROMPTS, 20, sampling, jax.random.key(0), logprobs=True)
        assert [text.tokens for text in found] == generate(Waves(), PROMPTS, 20, sampling, jax.random.key(0))


def test_a_program_that_cannot_be_lowered_leaves_garbage_collection_on():
    def programs() -> Iterator[jax.stages.Lowered]:
        assert not gc.isenabled()
        yield jax.jit(lambda x: x + 1).lower(1)
        raise ValueError("no such program")

    with pytest.raises(ValueError, match="no such program"):
        compile_together(programs())
    assert gc.isenabled()


def test_kernels_are_compiled_beside_their_program(monkeypatch):
    """Each once in a process, unless the program is found in JAX's persistent cache; a failure is said."""
    started_kernels, caller = [], threading.get_ident()

    def compile_kernel(kernel, device):
        assert device == caller  # whose thread has JAX's default device
        started_kernels.append(kernel)
        if kernel == "broken":
            raise ValueError("no such instruction")

    monkeypatch.setattr(compiled, "_compiled_kernels", set())
    monkeypatch.setattr(compiled, "default_device", threading.get_ident)
    monkeypatch.setattr(compiled, "_CACHED_SECONDS", 0.1)
    monkeypatch.setattr(kernel_programs, "kernels_of", lambda program: program.kernels)
    monkeypatch.setattr(kernel_programs, "compile_kernel", compile_kernel)
    program_ends = threading.Event()

    def program(*kernels: str, cached: bool = False):
        compile_ = (lambda: None) if cached else (lambda: program_ends.wait(60))
        return types.SimpleNamespace(compile=compile_, kernels={name.encode(): name for name in kernels})

    def compile_all(*programs, seconds=0.2):
        program_ends.clear()
        timer = threading.Timer(seconds, program_ends.set)
        timer.start()
        compile_together(programs)
        found = sorted(started_kernels)
        started_kernels.clear()
        return found

    assert compile_all(program("a", "b"), program("b", "c")) == ["a", "b", "c"]
    assert compile_all(program("a", "d")) == ["d"]
    with pytest.warns(UserWarning, match="1 of 2 kernels could not be compiled apart, .*: no such instruction"):
        assert compile_all(program("broken", "e")) == ["broken", "e"]
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", "no folder")
    try:
        assert compile_all(program("f", cached=True), program("g"), seconds=0.3) == ["g"]
        assert compile_all(program("f", "g"), seconds=0.3) == ["f"]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

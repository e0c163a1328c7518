"""Attention over prompts and over a cache, against loops in numpy; which implementation serves; what the H200 gets."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.models import compressible_blocks
from bipolar_jax.models.blocks import attention
from bipolar_jax.models.blocks.attention import (
    causal_attention,
    causal_implementation,
    decode_attention,
    prompts_alibi,
    whole_bias,
)
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.models.transformer import Transformer
from tests.support import sm90_compile

BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 2, 6, 2, 8, 11


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """One query [head_dim] over keys and values [positions, head_dim], float64."""
    scores = k @ q / np.sqrt(len(q)) + bias
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ v


def alibi(shape: tuple[int, ...]) -> jax.Array:
    """A bias as ALiBi's, slopes by head, or random where it has a query axis or a batch axis."""
    return normal(9, *shape)


BIASES = [None, (1, HEADS, 1, CAPACITY), (1, 1, 1, CAPACITY), (BATCH, HEADS, 1, CAPACITY)]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("bias_shape", BIASES, ids=str)
@pytest.mark.sample(2)
def test_a_token_attends_to_its_cache(bits, bias_shape):
    q = normal(0, BATCH, 1, HEADS, HEAD_DIM)
    keys, values = (normal(seed, BATCH, KV_HEADS, CAPACITY, HEAD_DIM) for seed in (1, 2))
    if bits is not None:
        keys, values = (QuantizedHeads.quantize(x, bits) for x in (keys, values))
    lengths = jnp.array([3, CAPACITY - 1])
    bias = None if bias_shape is None else alibi(bias_shape)
    found = jax.jit(decode_attention)(q, keys, values, lengths, bias)
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    keys, values = (np.asarray(x if bits is None else x.dequantize(), np.float64) for x in (keys, values))
    whole = (
        np.zeros((BATCH, HEADS, 1, CAPACITY)) if bias is None else np.broadcast_to(bias, (BATCH, HEADS, 1, CAPACITY))
    )
    for row in range(BATCH):
        seen = int(lengths[row]) + 1
        for head in range(HEADS):
            shared = head * KV_HEADS // HEADS
            arguments = (np.asarray(q[row, 0, head], np.float64), keys[row, shared, :seen], values[row, shared, :seen])
            expected = attend(*arguments, whole[row, head, 0, :seen])
            np.testing.assert_allclose(found[row, 0, head], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bias_shape", [None, (1, HEADS, 1, 5), (1, HEADS, 5, 5), (1, 1, 5, 5)], ids=str)
def test_a_prompt_attends_causally(bias_shape):
    q = normal(0, BATCH, 5, HEADS, HEAD_DIM)
    k, v = (normal(seed, BATCH, 5, KV_HEADS, HEAD_DIM) for seed in (1, 2))
    bias = None if bias_shape is None else alibi(bias_shape)
    found = jax.jit(causal_attention)(q, k, v, bias)
    whole = np.zeros((BATCH, HEADS, 5, 5)) if bias is None else np.broadcast_to(bias, (BATCH, HEADS, 5, 5))
    for row, position, head in np.ndindex(BATCH, 5, HEADS):
        shared, seen = head * KV_HEADS // HEADS, position + 1
        arguments = (
            q[row, position, head],
            k[row, :seen, shared],
            v[row, :seen, shared],
            whole[row, head, position, :seen],
        )
        expected = attend(*(np.asarray(x, np.float64) for x in arguments))
        np.testing.assert_allclose(found[row, position, head], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_prompts_of_narrow_floats_attend(dtype):
    """XLA's CPU backend lacks the dot of float16 with sums in float32."""
    q, k, v = (normal(seed, BATCH, 5, heads, HEAD_DIM) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    found = causal_attention(*(x.astype(dtype) for x in (q, k, v)), alibi((1, HEADS, 1, 5)))
    assert found.dtype == dtype
    expected = causal_attention(q, k, v, alibi((1, HEADS, 1, 5)))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=8 * float(jnp.finfo(dtype).eps))


def test_a_bias_of_one_row_is_the_same_with_a_row_for_each_query():
    q, k, v = (normal(seed, 1, 64, 4, HEAD_DIM) for seed in range(3))
    row = jnp.outer(2.0 ** -jnp.arange(1.0, 5.0), jnp.arange(1000.0, 1064.0))[None, :, None]
    whole = whole_bias(row)
    assert whole.shape == (1, 4, 64, 64)
    assert whole_bias(whole) is whole
    expected = causal_attention(q, k, v, row)
    # float32 keeps 5e-5 of numbers around 500; ALiBi's row itself is useless in bfloat16, whose step there is 4.
    np.testing.assert_allclose(causal_attention(q, k, v, whole), expected, rtol=0, atol=2e-4)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (whole, row)]
    errors = [jnp.abs(causal_attention(q, k, v, bias) - expected).max() for bias in rounded]
    assert errors[0] < 0.02 < errors[1]


@pytest.mark.parametrize("implementation", ["cudnn", "xla"])
def test_alibi_of_prompts_is_made_for_what_serves(implementation, monkeypatch):
    monkeypatch.setattr(
        attention, "default_device", lambda: device(platform="gpu" if implementation == "cudnn" else "cpu")
    )
    bias = prompts_alibi(shaped(1, 64, 4, 16))
    distances = np.arange(64.0) - np.arange(64.0)[:, None] if implementation == "cudnn" else np.arange(64.0)[None]
    expected = 2.0 ** -np.arange(2.0, 9.0, 2.0)[:, None, None] * distances
    assert bias.dtype == (jnp.bfloat16 if implementation == "cudnn" else jnp.float32)
    np.testing.assert_array_equal(bias[0], jnp.asarray(expected, bias.dtype))


def test_a_token_of_a_prompt_sees_what_it_sees_when_decoded():
    q, k, v = normal(0, 1, 5, HEADS, HEAD_DIM), normal(1, 1, 5, KV_HEADS, HEAD_DIM), normal(2, 1, 5, KV_HEADS, HEAD_DIM)
    bias = alibi((1, HEADS, 1, 5))
    last = decode_attention(q[:, 4:], k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.array([4]), bias)
    np.testing.assert_allclose(last, causal_attention(q, k, v, bias)[:, 4:], rtol=0, atol=2e-6)


def test_bfloat16_queries_get_bfloat16_and_are_summed_in_float32():
    """1000 values of 1 and one of 256 with equal weights: sums in bfloat16 would stop at 256."""
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    keys = jnp.zeros((1, 1, 1000, 8), jnp.bfloat16)
    values = jnp.ones((1, 1, 1000, 8), jnp.bfloat16)
    context = decode_attention(q, keys, values, jnp.array([999]))
    assert context.dtype == jnp.bfloat16
    np.testing.assert_array_equal(context.astype(jnp.float32), np.ones((1, 1, 1, 8)))


# Which implementation.


def device(capability="9.0", platform="gpu"):
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("on", "q", "bias", "expected"),
    [
        (device(), shaped(1, 64, 32, 128), None, "cudnn"),
        (device("8.0"), shaped(1, 64, 32, 128, dtype=jnp.float16), None, "cudnn"),
        (device("10.0"), shaped(1, 64, 32, 128), None, "cudnn"),
        (device("7.5"), shaped(1, 64, 32, 128), None, "xla"),
        (device("gfx90a"), shaped(1, 64, 32, 128), None, "xla"),
        (types.SimpleNamespace(platform="cpu"), shaped(1, 64, 32, 128), None, "xla"),
        (device(), shaped(1, 64, 32, 128, dtype=jnp.float32), None, "xla"),
        (device(), shaped(1, 64, 32, 256), None, "cudnn"),
        (device("8.9"), shaped(1, 64, 32, 256), None, "xla"),
        (device(), shaped(1, 64, 32, 264), None, "xla"),
        (device(), shaped(1, 64, 32, 100), None, "xla"),
        (device(), shaped(1, 64, 32, 128), shaped(1, 32, 64, 64), "cudnn"),
        (device(), shaped(1, 64, 32, 128), shaped(1, 32, 1, 64), "cudnn"),
        (device(), shaped(1, 64, 32, 128), shaped(1, 32, 64, 1), "xla"),
        (device(), shaped(1, 63, 32, 128), shaped(1, 32, 63, 63), "xla"),
        (device(), shaped(1, 63, 32, 128), None, "cudnn"),
    ],
)
def test_cudnn_serves_where_it_can(on, q, bias, expected):
    assert causal_implementation(on, q, bias) == expected


# What XLA makes of it on an H200, asked without one.


def quantized(config: TransformerConfig, implementation: str) -> Transformer:
    model = Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    return bj.quantize_model(model, [("^layers/", bj.Precision.parse("W2A2"))], implementation=implementation)


needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


@needs_compiler
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_cache_is_read_where_it_lies(bits):
    """Nothing as large as the codes of one layer's keys is written to memory beside it."""
    layers, heads, capacity, head_dim = 2, 32, 1024, 128
    kept = shaped(layers, 1, heads, capacity, head_dim)
    if bits is not None:
        kept = jax.eval_shape(lambda: QuantizedHeads.quantize(jnp.zeros(kept.shape), bits))
    cache = KVCache(kept, kept, shaped(1, dtype=jnp.int32))

    def decode(q, cache):
        def step(carry, layer):
            q, cache = carry
            cache = cache.write(layer, q, q)
            return (decode_attention(q, *cache.read(layer), cache.lengths), cache), None

        return jax.lax.scan(step, (q, cache), jnp.arange(layers))[0]

    compiled, _ = sm90_compile.compile_for_h200(decode, shaped(1, 1, heads, head_dim), cache)
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes / (2 * layers)


@needs_compiler
def test_a_quantized_model_on_the_h200_copies_no_cache(monkeypatch):
    """XLA, left to choose, transposes the whole cache around the Mosaic kernels."""
    config = TransformerConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=128,
        ffn_size=128,
        context_length=4096,
    )

    ids = jnp.zeros((2, 4096), jnp.int32)
    prefill = nnx.eval_shape(lambda: quantized(config, "xla").prefill(ids, jnp.full(2, 4096), 4096))
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    compiled, _ = sm90_compile.compile_for_h200(
        lambda model, ids, cache: model.decode(ids, cache),
        nnx.eval_shape(lambda: quantized(config, "sm90")),
        shaped(2, dtype=jnp.int32),
        prefill[1],
    )
    assert compiled.memory_analysis().temp_size_in_bytes < prefill[1].nbytes / (2 * config.num_layers)


@needs_compiler
def test_alibi_for_cudnn_is_made_once(monkeypatch):
    """Not in the loop over layers, where XLA would leave it, and to where it would bring it back."""
    heads, length, made = 4, 64, "bf16[1,4,64,64]"
    config = TransformerConfig(
        vocab_size=64,
        hidden_size=64,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=16,
        ffn_size=128,
        context_length=length,
        positions="alibi",
    )
    implementations = []

    def as_cudnn(q, k, v, *, bias, implementation, **_):
        """What takes the whole bias, as cuDNN does, which cannot be asked without a GPU."""
        implementations.append(implementation)
        return q + k + v + jnp.sum(jax.lax.optimization_barrier(bias), axis=(0, 2, 3))[None, None, :, None]

    monkeypatch.setattr(attention, "default_device", device)
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    model = nnx.eval_shape(lambda: Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    compiled, _ = sm90_compile.compile_for_h200(
        lambda model, ids: model.hidden_states(ids), model, shaped(1, length, dtype=jnp.int32)
    )
    assert implementations == ["cudnn"]
    program = compiled.as_text()
    carried = [line for line in program.splitlines() if re.search(r" while\(", line)]
    assert len(carried) == 1
    assert made in carried[0]
    kernels = re.findall(rf"= {re.escape(made)}\S* fusion\(.*", program)
    assert len(kernels) == 1
    assert "while/body" not in kernels[0]


@needs_compiler
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.covered("test_a_quantized_model_on_the_h200_copies_no_cache")
def test_prefill_writes_the_cache_in_place(bits, monkeypatch):
    """Nothing as large as the cache is written beside it, such as its transposition once all layers are through."""
    config = TransformerConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=16,
        num_heads=8,
        num_kv_heads=8,
        head_dim=16,
        ffn_size=128,
        context_length=1024,
    )

    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    monkeypatch.setattr(compressible_blocks, "causal_attention", lambda q, k, v, **_: q + k + v)
    compiled, _ = sm90_compile.compile_for_h200(
        lambda model, ids, lengths: model.prefill(ids, lengths, 1024, bits),
        nnx.eval_shape(lambda: quantized(config, "sm90")),
        shaped(8, 960, dtype=jnp.int32),
        shaped(8, dtype=jnp.int32),
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 2

"""The public operations, layers and programs under `jax_enable_x64`: the same numbers, in the same dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import bipolar_jax as bj
from bipolar_jax.compress.rounding import Rounding, round_rows
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.ops import Activation, LayerNorm, RMSNorm, lookup
from tests.support.integer_products import normal

X, W, BIAS = normal(4, 32), normal(32, 16, seed=1), normal(16, seed=2)
GAIN, SHIFT = normal(32, seed=3), normal(32, seed=4)
DENSE = (((1,), (0,)), ((), ()))
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SIZES |= {"ffn_size": 48, "context_length": 64}
KINDS = {
    "llama": {},
    "opt": {"positions": "learned", "ffn": "relu", "norm": "layer", "linear_bias": True},
    "bloom": {"positions": "alibi", "ffn": "gelu", "norm": "layer", "embed_norm": True},
}


def matmul(tmp_path):
    packed = bj.quantize(W, 4, 0, 8, "minmax")
    norm, gelu = LayerNorm(GAIN, SHIFT, 1e-5), Activation("gelu")
    gradient = jax.grad(lambda x, bias: bj.matmul(x, packed, 8, bias=bias).sum(), (0, 1))(X, BIAS)
    return [
        bj.matmul(X, packed, 8, bias=BIAS, prologue=norm),
        bj.matmul(X, packed, None, bias=BIAS, activation=gelu),
        bj.matmul(X.astype(jnp.bfloat16), packed, 8, prologue=RMSNorm(GAIN, 1e-5)),
        bj.matmul(X, packed, 3, implementation="reference"),
        packed.truncate(2).dequantize(),
        gradient,
    ]


def quantize(tmp_path):
    formats = ((4, "mse"), (1, "absmean"), (bj.TERNARY, "absmean"), (8, "absmax"))
    return [bj.quantize(W, bits, 0, calibration=calibration) for bits, calibration in formats]


def rounding(tmp_path):
    hessian = jnp.eye(32, dtype=jnp.float32)
    methods = Rounding(weighted_grid=True), Rounding(grid="zero_point", asymmetry=0.5)
    rounded = [round_rows(W.T, hessian, each, method, hessian) for each in ("W4A8", "W4A8g8") for method in methods]
    return [*rounded, round_rows(W.T, hessian, "W8A8", Rounding(nested=(6, 4)))]


def table(tmp_path):
    return lookup(bj.quantize(X, 4, -1), jnp.arange(3))


def fake_quant(tmp_path):
    return jax.value_and_grad(lambda w: (bj.fake_quant(w, 4, 0, 8) ** 2).sum())(W)


def dot_general(tmp_path):
    options = {"group_size": 8, "clip_activations": 3.0, "weight_norm": "standardize"}
    dot = bj.DotGeneral(4, 8, gradient=bj.GradientPrecision(bits=4), **options)
    return jax.grad(lambda x, w: dot(x, w, DENSE, key=jax.random.key(0)).sum(), (0, 1))(X, W)


def training(tmp_path):
    """A step of a model with learned step sizes and quantized gradients, and the packed model that it gives."""
    layers = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), nnx.LinearGeneral(16, (2, 4), rngs=nnx.Rngs(1))
    gradient = bj.GradientPrecision(bits=8)
    model = bj.quantization_aware(
        nnx.Sequential(*layers), [(".*", "W4A8g8f")], learned_steps=True, gradient=gradient, rngs=nnx.Rngs(gradient=0)
    )
    optimizer = nnx.Optimizer(model, bj.nn.adamw(optax.cosine_decay_schedule(1e-2, 10)), wrt=nnx.Param)
    loss, gradients = nnx.value_and_grad(
        lambda model: bj.nn.distillation_loss(model(X)[:, 0], BIAS[:16].reshape(4, 4))
    )(model)
    optimizer.update(model, gradients)
    return loss, nnx.state(model, nnx.Param), bj.quantize_model(model)(X)


def layers(tmp_path):
    linear = bj.nn.Linear.from_float(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), "W4A8")
    einsum = bj.nn.Einsum.from_float(nnx.Einsum("nta,hab->nthb", (8, 4, 2), (8, 2), rngs=nnx.Rngs(0)), "W2A2")
    embed = bj.nn.Embed.from_float(nnx.Embed(8, 32, rngs=nnx.Rngs(0)), "W8A8")
    dense = linen.Sequential([linen.Dense(16)])
    packed_linen, variables = bj.quantize_model(dense, [(".*", "W4A8")], dense.init(jax.random.key(0), X), X)
    x = X.reshape(1, 8, 4, 4)[0]
    return [linear(X), einsum(x), embed(jnp.arange(3)), embed.attend(X), packed_linen.apply(variables, X)]


def files(tmp_path):
    packed = {"dense": {"kernel": bj.quantize(W, 4, 0, 8), "bias": jnp.asarray(BIAS)}}
    path = tmp_path / "packed.safetensors"
    bj.save(path, packed)
    return bj.load(path)


def models(tmp_path):
    """The passes of every kind of model, packed, with a cache of 4 bits."""
    outputs = []
    for fields in KINDS.values():
        model = Transformer(TransformerConfig(**SIZES, **fields), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        prepared = prepare_for_inference(bj.quantize_model(model, [("^layers/", "W4A8g16")]))
        logits, cache = prepared.prefill(jnp.ones((2, 8), jnp.int32), jnp.array([8, 4]), 16, 4)
        outputs += [prepared(jnp.arange(6)[None]), logits, prepared.decode(jnp.arange(2), cache)[0]]
    return outputs


def texts(tmp_path):
    model = Transformer(TransformerConfig(**SIZES), rngs=nnx.Rngs(0))
    tokens = generate(model, [[1, 2, 3], [4]], 4, cache_bits=4)
    return np.asarray(tokens), perplexity(model, list(range(16)), windows=2, window_length=8).perplexity


@pytest.mark.parametrize("piece", [matmul, dot_general, files, texts], ids=lambda piece: piece.__name__)
@pytest.mark.sample(2)
def test_numbers_are_those_of_32_bits(piece, tmp_path):
    expected = jax.tree.leaves(piece(tmp_path))
    with jax.enable_x64(True):
        found = jax.tree.leaves(piece(tmp_path))
    assert [np.asarray(leaf).dtype for leaf in found] == [np.asarray(leaf).dtype for leaf in expected]
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float64(left), np.float64(right), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "piece", [quantize, rounding, table, fake_quant, training, layers, models], ids=lambda piece: piece.__name__
)
@pytest.mark.sample(2)
def test_shapes_and_dtypes_are_those_of_32_bits(piece):
    """Traced, not compiled."""

    def outputs():
        return jax.eval_shape(lambda: jax.tree.leaves(piece(None)))

    expected = outputs()
    with jax.enable_x64(True):
        assert outputs() == expected

"""SwiGLU whose gated product leaves one-bit tokens on Hopper: the numbers and gradients of layers by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.backend import Layer
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.projections import sign_projection
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks import feed_forward
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.transformer import DecoderLayer, Transformer
from tests.support import sm90_compile
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("clean_interpreter")]

M, HIDDEN, FFN = 70, 64, 96


def config(num_layers: int = 1) -> TransformerConfig:
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "hidden_size": HIDDEN, "ffn_size": FFN}
    return TransformerConfig(vocab_size=50, num_layers=num_layers, context_length=128, **sizes)


def joined(model, precision: str):
    """Only the feed-forward block may use Hopper's kernels: the others take their time in interpret mode."""
    rules = [(".*_proj", bj.Precision.parse(precision))]
    model = join_projections(bj.quantize_model(model, rules, implementation="xla"))
    ffn = model.ffn if isinstance(model, DecoderLayer) else model.layers.ffn
    ffn.gate_up_proj.implementation = ffn.down_proj.implementation = "auto"
    return model


def block(precision: str = "W1A1", dtype=jnp.bfloat16) -> DecoderLayer:
    return joined(DecoderLayer(config(), param_dtype=dtype, rngs=nnx.Rngs(0)), precision)


def without_signs(monkeypatch):
    def refuse(*args):
        raise Unsupported

    monkeypatch.setattr(sm90, "feed_forward", refuse)


def make(num_layers: int) -> Transformer:
    return joined(Transformer(config(num_layers), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), "W1A1")


@pytest.mark.covered("the kernel, by kernels/sm90/gemm/test_signs.py; the model, by `make gpu-test`")
def test_a_model_has_the_logits_of_layers_by_themselves(monkeypatch):
    model = make(1)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, M // 2)), jnp.int32)
    launched = []
    launch = sign_projection.launch
    monkeypatch.setattr(
        sign_projection, "launch", lambda *args, **options: launched.append(args) or launch(*args, **options)
    )
    with execution.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.jit(lambda model: model(ids))(model)
        assert len(launched) == 1
        assert not races_found()
        without_signs(monkeypatch)
        np.testing.assert_array_equal(found, jax.jit(lambda model: model(ids))(model))


def test_layers_are_a_loop_that_launches_once(monkeypatch):
    launched = []
    launch = sign_projection.launch
    monkeypatch.setattr(
        sign_projection, "launch", lambda *args, **options: launched.append(args) or launch(*args, **options)
    )
    with execution.interpreted(plgpu.InterpretGPUParams()):
        jax.eval_shape(lambda: make(3)(jnp.zeros((2, M // 2), jnp.int32)))
    assert len(launched) == 1


def by_xla(x, up, down, prologue, activation, residual):
    """`sm90.feed_forward` without the GPU, nor the time that interpreting takes."""
    options = {"implementation": "xla"}
    y = bj.matmul(x, up.w, up.a_format.bits, bias=up.bias, prologue=prologue, activation=activation, **options)
    return bj.matmul(y, down.w, down.a_format.bits, bias=down.bias, residual=residual, **options)


def test_gradients_are_those_of_layers_by_themselves(monkeypatch):
    layer = block("W2A1")
    x, cotangent = (jax.random.normal(jax.random.key(i), (1, M, HIDDEN), jnp.bfloat16) for i in range(2))

    def gradients():
        def loss(x, gain, scales):
            changed = nnx.clone(layer)
            changed.ffn_norm.scale[...] = gain
            for projection, scale in zip(projections(changed), scales, strict=True):
                weights = projection.kernel.get_value()
                projection.kernel.set_value(bj.BipolarArray(**vars(weights) | {"scale": scale}))
            return jnp.sum((changed.ffn(x, changed.ffn_norm) * cotangent).astype(jnp.float32))

        def projections(layer):
            return layer.ffn.gate_up_proj, layer.ffn.down_proj

        scales = [projection.kernel.get_value().scale for projection in projections(layer)]
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, layer.ffn_norm.scale[...], scales)

    monkeypatch.setattr(sm90, "feed_forward", by_xla)
    found = gradients()
    without_signs(monkeypatch)
    expected = gradients()
    for some, others in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.any(some)
        np.testing.assert_array_equal(some, others)


@pytest.mark.parametrize(
    ("precision", "dtype", "length"),
    [
        ("W1A2", jnp.bfloat16, M),
        ("W1A16", jnp.bfloat16, M),
        ("W1A1g32", jnp.bfloat16, M),
        ("W1A1", jnp.float32, M),
        ("W1A1", jnp.bfloat16, 64),
    ],
)
@pytest.mark.sample(2)
def test_layers_by_themselves_serve_the_rest(monkeypatch, precision, dtype, length):
    layer, x = block(precision, dtype), jnp.ones((1, length, HIDDEN), dtype)
    launched = []
    monkeypatch.setattr(sign_projection, "launch", lambda *args, **options: launched.append(args))
    with execution.interpreted(plgpu.InterpretGPUParams()):
        found = jax.eval_shape(lambda: layer.ffn(x, layer.ffn_norm))
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert not launched


def operands(m=M, dtype=jnp.bfloat16, bits=1, group_size=None, ffn=FFN):
    options = {"group_size": group_size, "scales": "float"}
    up, down = (bj.quantize(jnp.ones(shape), 1, 0, **options) for shape in ((HIDDEN, 2 * FFN), (ffn, HIDDEN)))
    x = jnp.zeros((m, HIDDEN), dtype)
    layers = Layer(up, bj.BipolarFormat(1), None), Layer(down, bj.BipolarFormat(bits), None)
    return x, *layers, None, feed_forward.gate_activation("swiglu"), x


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float32}, "of bfloat16 or float16, not float32"),
        ({"bits": 2}, "signs are tokens of one bit, not 2"),
        ({"m": 64}, "64 tokens are too few"),
        ({"group_size": 32}, "with groups of weights"),
        ({"ffn": 1 << 17}, "ones are counted up to 131071, not 131072"),
    ],
)
def test_what_the_kernel_does_not_serve(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        sign_projection.feed_forward(*operands(**options))


def test_it_needs_a_hopper_gpu():
    with pytest.raises(NotImplementedError, match="compute capability"):
        sm90.feed_forward(*operands())


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
def test_on_the_h200_numbers_between_the_products_never_leave_the_chip(monkeypatch):
    layer = nnx.eval_shape(block)
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    x = jax.ShapeDtypeStruct((2, 512, HIDDEN), jnp.bfloat16)
    compiled, report = sm90_compile.compile_for_h200(lambda layer, x: layer.ffn(x, layer.ffn_norm), layer, x)
    assert report.spill_bytes == 0
    assert "u32[1,1024,4]" in compiled.as_text()  # the words
    assert f"bf16[1024,{FFN}]" not in compiled.as_text()

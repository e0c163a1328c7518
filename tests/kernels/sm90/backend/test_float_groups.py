"""Prepared weights with float scales of groups on Hopper: whole products of `bj.matmul`, and plans."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.backend import expanded_planning, operations
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops import Activation
from tests.packing.float_groups import float_groups
from tests.support.integer_products import normal, random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

GATE = Activation("silu", gated=True)


@pytest.mark.parametrize(
    ("m", "bits", "group_size", "kind", "a_bits", "gated", "tolerance"),
    [
        (3, 4, 32, "zeros", 8, True, 1e-5),
        (66, 4, 128, "offsets", 8, False, 1e-5),
        (65, 8, 128, "scales", 5, True, 1e-5),  # an activation of its own
        (66, 4, 32, "offsets", 8, True, 1e-3),  # float16, the activation in the epilogue
        (65, 2, 48, "zeros", 1, False, 1e-3),  # in the order of floats
        (66, 4, 32, "block_minimums", 8, False, 1e-3),  # steps of either sign, as of GGUF's Q4_K
        (66, 3, 16, "block_scales", 8, False, 1e-3),
    ],
)
@pytest.mark.sample(1)
def test_the_whole_product_is_that_of_xla(m, bits, group_size, kind, a_bits, gated, tolerance):
    n, k = 72, 256 if kind.startswith("block") else 200
    w = float_groups(BipolarFormat(bits), n, k, group_size, kind)
    columns, activation = (n // 2, GATE) if gated else (n, None)
    options = {
        "bias": jnp.asarray(normal(n)),
        "activation": activation,
        "residual": None if group_size == 32 else jnp.asarray(normal(m, columns)),
    }
    x = jnp.asarray(normal(m, k))
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found = bj.matmul(x, w.prepare(gated=gated), a_bits, implementation="sm90", **options)
    expected = np.asarray(bj.matmul(x, w, a_bits, implementation="xla", **options))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert not races_found()


def test_plans_are_explained():
    kernel = jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16)

    def explained(m, group_size):
        w = jax.eval_shape(lambda kernel: bj.quantize(kernel, 4, 0, group_size, scales="float").prepare(), kernel)
        with interpreted(plgpu.InterpretGPUParams()):
            return bj.explain(jax.ShapeDtypeStruct((m, 4096), jnp.bfloat16), w, 8)

    few = explained(3, 128)
    assert few.kernel == "int8 tensor cores, weights of 4 bits in float groups of 128 expanded in registers"
    assert few.reason == "3 tokens: bound by reading the weights"
    assert isinstance(few.tiling, FewTokensTiling)
    many, short = explained(2048, 128), explained(2048, 32)
    assert many.kernel == few.kernel
    assert many.tiling == expanded_planning.ONE_CHUNK_CANDIDATES[0]
    weights = "weights of 4 bits in float groups of 32 expanded to float16 in registers"
    assert short.kernel == f"float16 tensor cores, {weights}"


def test_integer_sums_stay_on_the_chip():
    w = float_groups(BipolarFormat(4), 8, 64, 32, "scales").prepare()
    codes = jnp.asarray(random_codes(BipolarFormat(8), 2, 64, 0))
    with interpreted(plgpu.InterpretGPUParams()), pytest.raises(Unsupported, match="do not leave the chip"):
        operations.integer_matmul(codes, w, BipolarFormat(8))

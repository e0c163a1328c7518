"""The Hopper quantizer gives the numbers of `quantize_tokens`, packed; without races, and without spills on sm_90a."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.activations import quantize_tokens
from bipolar_jax.kernels.sm90.quantize import PackedTokens, quantize_and_pack
from bipolar_jax.packing.words import unpack_codes

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def interpreted(x, a_format, operand, norm=None) -> PackedTokens:
    """In interpret mode, which must find no race."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    packed = jax.jit(quantize_and_pack, static_argnums=(1, 2), static_argnames="interpret")(
        x, a_format, operand, norm=norm, interpret=params
    )
    jax.block_until_ready(packed)
    assert not interpret_pallas_call.get_races().races_found
    return packed


def unpacked(packed: PackedTokens, a_format: BipolarFormat, operand: str, k: int) -> np.ndarray:
    """The codes, by the definition of the words; all that follows them must be zero."""
    words = np.asarray(packed.words)
    if operand == "planes":
        assert words.shape[0] == a_format.bits
        assert words.shape[2] == -(-k // 128) * 4
        codes = np.asarray(unpack_codes(packed.words, a_format, 32 * words.shape[2])).astype(np.int64)
    else:
        assert words.shape[0] == 1
        blocks = -(-k // 32)
        codes = np.full((words.shape[1], 32 * blocks), -1000)
        in_bytes = words[0].astype("<u4").view(np.int8).reshape(-1, blocks, 8, 4)
        for j in range(8):
            for t in range(4):
                codes[:, 8 * t + j :: 32] = in_bytes[:, :, j, t]
        codes[:, :k] += a_format.code_offset
    assert not codes[:, k:].any()
    return codes[:, :k]


def assert_numbers(packed: PackedTokens, x, a_format: BipolarFormat, operand: str) -> None:
    """Bit for bit what `quantize_tokens` gives; rows with a scale that is no number have no codes to compare."""
    tokens = jax.jit(quantize_tokens, static_argnums=1)(x, a_format)
    np.testing.assert_array_equal(packed.scale, tokens.scale)
    finite = np.isfinite(np.asarray(tokens.scale))
    codes = np.asarray(tokens.codes)[finite]
    zero_code = 0 if a_format.bits == 1 else (np.asarray(tokens.zero_value) + a_format.max_value) // 2
    np.testing.assert_array_equal(unpacked(packed, a_format, operand, x.shape[1])[finite], codes)
    np.testing.assert_array_equal(np.asarray(packed.code_sums)[finite], codes.sum(axis=1, dtype=np.int32))
    np.testing.assert_array_equal(np.asarray(packed.zero_code)[finite], (zero_code + np.zeros(x.shape[0], int))[finite])


@pytest.mark.parametrize("operand", ["planes", "int8"])
@pytest.mark.parametrize(("m", "k", "bits"), [(1, 1, 1), (5, 96, 2), (3, 100, 3), (7, 128, 4), (2, 255, 5), (9, 64, 8)])
def test_the_numbers_of_quantize_tokens(m, k, bits, operand):
    rng = np.random.default_rng(m + k)
    a_format, dtype = BipolarFormat(bits), DTYPES[bits % 3]
    x = jnp.asarray(rng.standard_normal((m, k)) * rng.lognormal(size=(m, 1)), dtype)
    assert_numbers(interpreted(x, a_format, operand), x, a_format, operand)

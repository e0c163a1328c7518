"""Tokens that the product's kernel quantizes: the numbers of `quantize_and_pack` in front of it, and compiled."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, RMSNorm
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import FloatTokensToQuantize, few_tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from tests.kernels.sm90.prepared_few_tokens.test_prepared_few_tokens import A8, INTERPRET, NO_RACES, weights
from tests.support.interpreter import races_found

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def prologue_of(name: str | None, k: int):
    vector = jnp.asarray(np.random.default_rng(1).standard_normal(k), jnp.bfloat16)
    prologues = {
        None: None,
        "rms": RMSNorm(vector, 1e-5),
        "layer": LayerNorm(vector, vector[::-1], 1e-5),
        "gated": Activation("silu", gated=True),
        "rotated": Hadamard((64,), k // 64),
    }
    return prologues[name]


@pytest.mark.parametrize(
    ("name", "m", "k", "tiling"),
    [
        # Two blocks that share tokens, of which one has no unit; more turns than slots.
        ("rms", 3, 640, FewTokensTiling(1, slots=2, quantizers=2)),
        # Fewer warpgroups than tokens; units of several parts.
        (None, 5, 256, FewTokensTiling(2, parts=3, slots=2, quantizers=1)),
    ],
)
def test_numbers_are_those_of_quantized_tokens(name, m, k, tiling):
    n, rng = 150, np.random.default_rng(0)
    prologue = prologue_of(name, k)
    x = jnp.asarray(rng.standard_normal((m, k * (1 if prologue is None else prologue.parts))), jnp.bfloat16)
    w = weights(4, 64, n, k)[0].prepare()
    found = few_tokens_product(
        FloatTokensToQuantize(x, prologue), w, A8, None, jnp.float32, tiling=tiling, blocks=4, interpret=INTERPRET
    )
    assert not races_found()
    tokens = quantize_and_pack(x, A8, "int8", prologue=prologue, interpret=NO_RACES)
    plain = FewTokensTiling(1, slots=2)
    expected = few_tokens_product(tokens, w, A8, None, jnp.float32, tiling=plain, blocks=2, interpret=NO_RACES)
    np.testing.assert_array_equal(found, expected)

"""Every test, and every program that a test starts, runs under JAX's strict promotion of dtypes and ranks."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest


def test_implicit_promotion_is_an_error():
    assert os.environ["JAX_NUMPY_DTYPE_PROMOTION"] == "strict"
    assert os.environ["JAX_NUMPY_RANK_PROMOTION"] == "raise"
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)

"""Hadamard rotations against dense matrices in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.kernels.semantics.hadamard import (
    LARGEST_ORDER,
    Hadamard,
    hadamard,
    hadamard_matrix,
    is_known_order,
    random_signs,
)
from tests.compress.rotations.dense_rotations import dense

# Multiples of 4 up to 256 that no product of Sylvester's and Paley's matrices reaches.
UNKNOWN = [92, 116, 156, 172, 184, 188, 232, 236]


def test_every_known_order_has_a_matrix():
    known = [order for order in range(1, LARGEST_ORDER + 1) if is_known_order(order)]
    assert known[:13] == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 48]  # 40 is 20 times 2
    for order in known:
        matrix = hadamard_matrix(order).astype(int)
        assert set(np.unique(matrix)) <= {-1, 1}
        np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))


def test_few_sizes_are_unknown():
    assert [size for size in range(4, LARGEST_ORDER + 1, 4) if hadamard(size).blocks > 1] == UNKNOWN
    assert not any(map(is_known_order, (3, 6, 10, 14, LARGEST_ORDER * 2)))


@pytest.mark.parametrize(
    ("size", "orders", "blocks"),
    [
        (576, (12, 12, 4), 1),  # SmolLM2-135M
        (1536, (12, 128), 1),
        (960, (12, 20, 4), 1),  # SmolLM2-360M
        (14336, (28, 32, 16), 1),  # Llama 3, Mistral
        (18944, (148, 128), 1),  # Qwen2.5-7B
        (4096, (64, 64), 1),
        (64, (64,), 1),
        (80, (20, 4), 1),
        (11008, (16, 16), 43),  # Llama 2: no known order of at most 256 has the factor 43 and divides it
        (20, (20,), 1),
        (6, (2,), 3),
        (7, (), 7),
    ],
)
def test_the_largest_blocks_are_taken(size, orders, blocks):
    assert hadamard(size) == Hadamard(orders, blocks)


def test_shards_have_whole_blocks():
    assert hadamard(1536, shards=4) == Hadamard((12, 32), 4)
    assert hadamard(1536, shards=3) == Hadamard((32, 16), 3)
    with pytest.raises(ValueError, match="1536 numbers cannot be divided into 5 equal shards"):
        hadamard(1536, shards=5)


def test_blocks_of_one_size():
    assert hadamard(1536, block=64) == Hadamard((64,), 24)
    assert hadamard(11008, shards=2, block=128) == Hadamard((128,), 86)
    for block in (0, 1024, 3):
        with pytest.raises(ValueError, match=f"1536 numbers cannot be rotated in blocks of {block}"):
            hadamard(1536, block=block)


@pytest.mark.parametrize("orders", [(64,), (4, 16), (2, 2)])
def test_powers_of_two_are_butterflies_in_a_stated_order(orders):
    """Bit for bit: kernels have the same stages."""
    rotation = Hadamard(orders, 3)
    x = np.random.default_rng(1).standard_normal((5, rotation.size)).astype(np.float32)
    expected, places = x.copy(), np.arange(rotation.size)
    for stage in range(rotation.block.bit_length() - 1):
        low = places[places >> stage & 1 == 0]
        a, b = expected[:, low], expected[:, low + 2**stage]
        expected[:, low], expected[:, low + 2**stage] = a + b, a - b
    expected *= np.float32(rotation.block**-0.5)
    for rotate in (rotation, jax.jit(rotation)):
        np.testing.assert_array_equal(rotate(jnp.asarray(x)), expected)


def test_kernels_rotate_blocks_of_a_warp():
    assert [r.within_warp for r in (hadamard(512, block=256), Hadamard((2,), 7))] == [True, True]
    assert [r.within_warp for r in (hadamard(512), hadamard(48), hadamard(64, signs=1))] == [False] * 3


@pytest.mark.parametrize(
    "rotation",
    [hadamard(48), hadamard(576, signs=3), hadamard(44, shards=2), hadamard(7, signs=0), Hadamard((12, 2, 4), 3, 9)],
    ids=str,
)
def test_a_rotation_is_its_matrix(rotation):
    matrix = dense(rotation)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(rotation.size), atol=1e-12)
    x = np.random.default_rng(0).standard_normal((2, 3, rotation.size)).astype(np.float32)
    rotated = rotation.rotate(jnp.asarray(x))
    np.testing.assert_allclose(rotated, x @ matrix, rtol=0, atol=3e-6)
    np.testing.assert_allclose(rotation.undo(rotated), x, rtol=0, atol=3e-6)
    np.testing.assert_allclose(rotation.undo(jnp.asarray(x)), x @ matrix.T, rtol=0, atol=3e-6)
    assert rotation.rotate(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_signs_stay_the_same_for_ever():
    """Files hold the seed, not the signs."""
    assert random_signs(0, 12).tolist() == [-1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, 1]
    assert np.abs(random_signs(1, 4096).mean(dtype=float)) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"orders": (12, 6)}, "no Hadamard matrix of order 6 is known"),
        ({"orders": (10**12,)}, "no Hadamard matrix of order 1000000000000 is known"),
        ({"orders": ("12",)}, "no Hadamard matrix of order '12' is known"),
        ({"orders": (2,), "blocks": 0}, "at least 1 block"),
        ({"orders": (2,), "blocks": 2**24}, "at most 2.24 numbers"),
        ({"orders": (2,), "signs": -1}, "a seed from 0"),
    ],
)
def test_impossible_rotations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Hadamard(**fields)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="a rotation of 12 numbers was given 24"):
        hadamard(12).rotate(jnp.zeros((2, 24)))

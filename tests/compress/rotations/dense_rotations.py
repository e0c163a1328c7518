"""Rotations as dense matrices in float64."""

from __future__ import annotations

import functools

import numpy as np

from bipolar_jax.kernels.semantics.hadamard import Hadamard, hadamard_matrix, random_signs


def dense(rotation: Hadamard) -> np.ndarray:
    """R of x @ R."""
    block = functools.reduce(np.kron, [hadamard_matrix(order).astype(np.float64) for order in rotation.orders], 1.0)
    block = np.atleast_2d(block) / np.sqrt(np.size(block) ** 0.5)
    signs = np.ones(rotation.size) if rotation.signs is None else random_signs(rotation.signs, rotation.size)
    return signs[:, None] * np.kron(np.eye(rotation.blocks), block)

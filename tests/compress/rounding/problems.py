"""Weights, Hessians and losses that the tests of rounding share, in float64."""

from __future__ import annotations

import numpy as np


def hessian_of(k: int, seed: int = 0, condition: float = 1e3) -> np.ndarray:
    """A Hessian of mean diagonal 1 with eigenvalues down to 1 / condition of the largest."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(k, k)))[0]
    hessian = (basis * np.geomspace(1, 1 / condition, k)) @ basis.T
    return hessian / np.mean(np.diag(hessian))


def losses_of(w: np.ndarray, q: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """(w - q) H (w - q)^T of every row."""
    error = np.asarray(w, np.float64) - np.asarray(q, np.float64)
    return np.sum(error @ hessian * error, axis=1)

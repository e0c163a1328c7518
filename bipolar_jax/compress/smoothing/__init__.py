"""Outliers of activations moved into weights, for models that are not rotated."""

from bipolar_jax.compress.smoothing.method import Smoothing
from bipolar_jax.compress.smoothing.smooth import smooth

__all__ = ["Smoothing", "smooth"]

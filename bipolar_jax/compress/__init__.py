"""Compression of models with data: rotations or smoothing, and rounding for the inputs that layers get."""

from bipolar_jax.compress.calibrate import calibrate
from bipolar_jax.compress.reconstruction import Reconstruction
from bipolar_jax.compress.rotations.rotate import rotate
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.smoothing import Smoothing, smooth

__all__ = ["Reconstruction", "Rounding", "Smoothing", "calibrate", "rotate", "smooth"]

"""Compression of models with data: rotations, and rounding for the inputs that layers get."""

from bipolar_jax.compress.calibrate import calibrate
from bipolar_jax.compress.rotations.rotate import rotate
from bipolar_jax.compress.rounding import Rounding

__all__ = ["Rounding", "calibrate", "rotate"]

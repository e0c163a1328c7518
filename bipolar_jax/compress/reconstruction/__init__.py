"""Blocks whose layers were rounded one by one learn to put out together what the float model's blocks do."""

from bipolar_jax.compress.reconstruction.method import Reconstruction

__all__ = ["Reconstruction"]

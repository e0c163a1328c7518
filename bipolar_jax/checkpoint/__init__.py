"""Checkpoints of packed arrays in safetensors files."""

from bipolar_jax.checkpoint.packed_file import load, read_user, save

__all__ = ["load", "read_user", "save"]

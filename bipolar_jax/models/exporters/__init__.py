"""Exporters of packed models to formats that other programs read."""

from bipolar_jax.models.exporters.compressed_tensors import export_compressed_tensors

__all__ = ["export_compressed_tensors"]

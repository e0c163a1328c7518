"""Exporters of packed models to formats that other programs read."""

from bipolar_jax.models.exporters.compressed_tensors import export_compressed_tensors
from bipolar_jax.models.exporters.gguf import GGUFExport, export_gguf

__all__ = ["GGUFExport", "export_compressed_tensors", "export_gguf"]

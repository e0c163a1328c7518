"""Transformers on the devices of a mesh: tensor parallel, data parallel, or both."""

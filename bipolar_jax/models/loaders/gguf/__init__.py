"""Loader of GGUF files."""

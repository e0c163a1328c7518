"""Loader of Hugging Face directories."""

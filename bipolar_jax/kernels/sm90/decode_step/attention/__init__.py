"""Attention to the cache within the kernel of the decode step."""

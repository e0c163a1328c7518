"""Cached keys and values, as floats or in 8 or 4 bits."""

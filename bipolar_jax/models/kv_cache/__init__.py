"""The cache of keys and values, in floats or in 8 or 4 bits."""

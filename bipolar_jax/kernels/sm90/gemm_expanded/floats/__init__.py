"""Products of 16-bit floats with weights that are expanded in registers."""

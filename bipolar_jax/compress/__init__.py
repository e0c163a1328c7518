"""Compression of models with data: rotations, and rounding for the inputs that layers get."""

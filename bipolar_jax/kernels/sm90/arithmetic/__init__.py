"""Arithmetic that kernels share: operand layouts, recovery of products, epilogue, grids, activation functions."""

"""Quantized products for training."""

"""Measured choices, one JSON table a device; `experiments/tune_matmul.py` writes them."""

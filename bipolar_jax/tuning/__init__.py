"""Measured choices, one JSON table a device; `experiments/bench/tune.py` writes them."""

"""Benchmarks of matrix products, language models and training steps; the tuner; the ablation."""

"""Benchmarks: matrix products, language models, training steps; the tuner and the ablation."""

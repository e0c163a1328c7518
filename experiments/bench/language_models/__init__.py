"""The implementation of experiments/bench/llm.py."""

"""Tuning tables: the fastest measured kernel configurations, one JSON file per device (`experiments/bench/tune.py`)."""

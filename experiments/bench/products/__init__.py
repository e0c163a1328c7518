"""What the benchmarks of matrix products share."""

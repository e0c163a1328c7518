"""Shared by the benchmarks of matrix products: shapes, operands, timed functions, checks, tables, plots."""

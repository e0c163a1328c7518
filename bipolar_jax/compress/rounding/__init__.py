"""Rounding with a Hessian: rows of weights to codes and a grid of least output error."""

from bipolar_jax.compress.rounding.method import RoundedRows, Rounding
from bipolar_jax.compress.rounding.round_rows import round_rows

__all__ = ["RoundedRows", "Rounding", "round_rows"]

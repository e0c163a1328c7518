"""The bipolar-INT number format."""

from bipolar_jax.format.bipolar_format import TERNARY, BipolarFormat, as_format

__all__ = ["TERNARY", "BipolarFormat", "as_format"]

"""Types of values, and constants."""

from __future__ import annotations

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir

Value = ir.Value
Pointer = ir.Value
GLOBAL, SHARED = 1, 3  # address spaces


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def f32_type() -> ir.Type:
    return ir.F32Type.get()


def int32(number: int) -> Value:
    """A constant, given signed or unsigned."""
    return mgpu.c(number - (1 << 32) if number >= 1 << 31 else number, i32_type())


def float32(number: float) -> Value:
    return mgpu.c(float(number), f32_type())


def _value(number: Value | int) -> Value:
    """The number itself, or a constant."""
    return int32(number) if isinstance(number, int) else number

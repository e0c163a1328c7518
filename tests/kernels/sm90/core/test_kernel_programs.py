"""Kernels of a program that are compiled before it: which, and that the program finds them."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.extend.mlir import ir

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core.kernel_programs import compile_kernel, kernels_of
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from tests.support import sm90_compile
from tests.support.optimizations import optimizations

X = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def two_kernels(x):
    return [quantize_and_pack(y, BipolarFormat(bits), "int8").words for y, bits in ((x, 7), (2 * x, 7), (x, 5))]


def test_kernels_become_programs():
    def lowered(function):
        return jax.jit(function).trace(X).lower(lowering_platforms=("cuda",))

    kernels = kernels_of(lowered(two_kernels))
    assert len(kernels) == 2
    for kernel in kernels.values():
        assert kernel.operation.verify()
        assert str(kernel).count("custom_call @mosaic_gpu_v2") == 1
    assert kernels.keys() == kernels_of(lowered(two_kernels)).keys()
    assert kernels_of(lowered(lambda x: x + 1)) == {}


def test_the_program_is_left_alone_meanwhile():
    """Another thread compiles it: while it is written as bytecode, foreign uses of its values crash the process."""
    program = jax.jit(two_kernels).trace(X).lower(lowering_platforms=("cuda",))
    operands = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            operands.extend(operation.operands)
        return ir.WalkResult.ADVANCE

    program.compiler_ir("stablehlo").operation.walk(visit)

    def uses() -> int:
        return sum(1 for operand in operands for _ in operand.uses)

    found, expected, before = set(), uses(), sys.gettrace()

    def trace(frame, event, arg):
        found.add(uses())
        return trace

    sys.settrace(trace)
    try:
        kernels_of(program)
    finally:
        sys.settrace(before)
    assert found == {expected}


@needs_compiler
def test_a_program_finds_the_kernels_that_were_compiled_before():
    with optimizations(True):
        program = sm90_compile.lower_for_h200(two_kernels, X)
        for kernel in kernels_of(program).values():
            _, report = sm90_compile.reported(functools.partial(compile_kernel, kernel, sm90_compile.h200()))
            assert len(report.registers) == 1
        _, report = sm90_compile.reported(program.compile)
        assert report.registers == ()

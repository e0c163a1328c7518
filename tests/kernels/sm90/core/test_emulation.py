"""A kernel's module does not depend on what its process has lowered before: caches take modules by their bytes."""

from __future__ import annotations

import re

import jax

from bipolar_jax.kernels.sm90.core.execution import overlapped_launches
from tests.gpu.sanitized import KERNELS
from tests.support.optimizations import optimizations


def hashes(program, avals) -> list[str]:
    """Of the kernels of a program that is lowered anew, in order; no compiler is needed."""
    with optimizations(True):
        lowered = jax.jit(lambda *arrays: program.function(*arrays)).trace(*avals).lower(lowering_platforms=("cuda",))
    return re.findall(r'kernel_hash = "(.*?)", module', lowered.as_text())


def test_a_kernel_has_the_same_hash_whenever_it_is_lowered():
    first, second = (KERNELS[name].make().programs["program"] for name in ("quantizer", "quantizer, norm"))
    first_avals, second_avals = (jax.tree.map(jax.typeof, program.operands) for program in (first, second))
    alone = hashes(first, first_avals)
    other = hashes(second, second_avals)
    assert alone
    assert other != alone
    assert hashes(first, first_avals) == alone
    assert hashes(second, second_avals) == other


def test_overlapped_launches_wait_for_the_kernel_before_them():
    """A kernel lets the next one start; producer and consumers wait. By default they do neither."""
    program = KERNELS["expanded, codes"].make().programs["program"]

    def steps():
        jaxpr = jax.make_jaxpr(lambda *arrays: program.function(*arrays))(*program.operands)
        return sorted(re.findall(r"griddepcontrol_\w+", str(jaxpr)))

    assert not steps()
    with overlapped_launches():
        assert steps() == ["griddepcontrol_launch_dependents", "griddepcontrol_wait", "griddepcontrol_wait"]

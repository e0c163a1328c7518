"""What `launch_kernel` does about Mosaic GPU: modules without numbers, and one question to ptxas."""

from __future__ import annotations

import re
import types

import jax

from bipolar_jax.kernels.sm90.core import emulation
from tests.gpu.sanitized import KERNELS
from tests.support.optimizations import optimizations


def hashes(program, avals) -> list[str]:
    """Of the kernels of a program that is lowered anew, in order; no compiler is needed."""
    with optimizations(True):
        lowered = jax.jit(lambda *arrays: program.function(*arrays)).trace(*avals).lower(lowering_platforms=("cuda",))
    return re.findall(r'kernel_hash = "(.*?)", module', lowered.as_text())


def test_a_kernel_has_the_same_hash_whenever_it_is_lowered():
    """Caches take modules by their bytes."""
    first, second = (KERNELS[name].make().programs["program"] for name in ("quantizer", "quantizer, norm"))
    first_avals, second_avals = (jax.tree.map(jax.typeof, program.operands) for program in (first, second))
    alone = hashes(first, first_avals)
    other = hashes(second, second_avals)
    assert alone
    assert other != alone
    assert hashes(first, first_avals) == alone
    assert hashes(second, second_avals) == other


def test_ptxas_is_asked_for_its_version_once(monkeypatch):
    asked = []
    extension = types.SimpleNamespace(_get_ptxas_isa_version=lambda: asked.append(1) or 90)
    monkeypatch.setattr(emulation.fragmented_array, "mgpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=extension))
    program = KERNELS["quantizer"].make().programs["program"]
    avals = jax.tree.map(jax.typeof, program.operands)
    assert hashes(program, avals) == hashes(program, avals)
    assert asked == [1]

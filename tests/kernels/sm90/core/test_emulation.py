"""How kernels are lowered: to the same module in every process, and without processes of ptxas."""

from __future__ import annotations

import re
import types

import jax
import pytest

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


# Of kernels and their programs: of the decode step the zero codes of a cache of 8 bits, of the product the branch of
# Mosaic's order of tiles, in the producer and the consumer.
CONVERSIONS = {
    ("decode step, prepared", "one kernel"): 2,
    ("expanded, codes", "program"): 2,
    ("few tokens, prepared codes", "program"): 0,
    ("quantizer, norm", "program"): 0,
}


@pytest.mark.parametrize(("name", "program"), CONVERSIONS)
def test_no_bool_is_converted(name, program, monkeypatch):
    """Mosaic GPU asks ptxas for its version at conversions of bools and of 8 bits: a process each time."""
    asked = []
    extension = types.SimpleNamespace(_get_ptxas_isa_version=lambda: asked.append(1) or 90)
    library = "jax.experimental.mosaic.gpu.fragmented_array.mgpu_lib"
    monkeypatch.setattr(library, types.SimpleNamespace(_mosaic_gpu_ext=extension))
    made = KERNELS[name].make().programs[program]
    assert hashes(made, jax.tree.map(jax.typeof, made.operands))
    assert len(asked) == CONVERSIONS[name, program]

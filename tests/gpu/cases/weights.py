"""Weights rounded, packed and expanded on the GPU: the bits that jnp gives on a CPU."""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np

from bipolar_jax.kernels.semantics import weights
from bipolar_jax.kernels.sm90.arithmetic.operands import expand_planes
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.weight_prep.expand import expand
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import generator
from tests.gpu.trial import Case, Trial, one_program
from tests.support.integer_products import W_FORMATS

SM90 = BACKENDS["sm90"]

# k, n, group size, dtype: whole blocks and a run more; less than a word beyond a run; groups that end within a run.
_PACKED = [
    (384, 64, None, ml_dtypes.bfloat16),
    (269, 71, 32, np.float32),
    (160, 3, 96, ml_dtypes.bfloat16),
    (1000, 333, 64, np.float16),
    (2048, 515, None, np.float32),
]
# n and words of a row.
_EXPANDED = [(3, 5), (37, 44), (1001, 7), (515, 128)]


def cases() -> list[Case]:
    packed = [_packing(fmt, *_PACKED[(index + turn) % 5]) for index, fmt in enumerate(W_FORMATS) for turn in range(3)]
    expanded = [_expansion(fmt, *size) for index, fmt in enumerate(W_FORMATS) for size in _EXPANDED[index % 2 :: 2]]
    return packed + expanded


def small() -> dict[str, Case]:
    fmt = W_FORMATS[2]
    return {"packing": _packing(fmt, 269, 71, 32, np.float32), "expansion": _expansion(fmt, 37, 44)}


def _packing(fmt, k: int, n: int, group_size: int | None, dtype) -> Case:
    def make() -> Trial:
        rng = generator(k, n, fmt.bits)
        shape = (n, -(-k // (group_size or k)))
        half_steps = (rng.uniform(0.05, 0.3, shape) * fmt.max_value).astype(np.float32)
        offset = rng.uniform(-1, 1, shape).astype(np.float32) if group_size else None
        operands = (rng.standard_normal((k, n)).astype(dtype), half_steps, offset)
        options = {"number_format": fmt, "group_size": group_size}
        expected = _on_cpu(functools.partial(weights.pack_weights, **options), *operands)
        return one_program(functools.partial(SM90.pack_weights, **options), operands, _equals(expected))

    group = "" if group_size is None else f"g{group_size}"
    return Case(f"packing, W{fmt.name}{group} {k}x{n} {np.dtype(dtype).name}", make)


def _expansion(fmt, n: int, words: int) -> Case:
    def make() -> Trial:
        """Any bits, also those that no ternary code has."""
        planes = generator(n, words).integers(0, 1 << 32, (fmt.bits, n, words), np.uint32)
        expected = _on_cpu(lambda planes: expand_planes(planes, fmt), planes)
        return one_program(
            lambda planes: expand(planes, fmt, interpret=interpret_params()), (planes,), _equals(expected)
        )

    return Case(f"expansion, W{fmt.name} {n}x{32 * words}", make)


def _on_cpu(function, *operands):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(function)(*operands))


def _equals(expected):
    def check(found):
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(got, wanted)

    return check

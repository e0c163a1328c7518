"""Pallas kernels for NVIDIA Hopper: binary and int8 tensor cores, fed by TMA; attention of one token, whole layers.

Pallas is imported when a Hopper GPU (or a test that interprets) first wants it: it takes a
second, and not every platform's jaxlib has it.
"""

from __future__ import annotations

import functools
from types import ModuleType

import jax

from bipolar_jax.kernels.semantics import weights
from bipolar_jax.kernels.sm90.core.execution import check_runnable, interpret_params

__all__ = [
    "decode_attention",
    "decode_layers",
    "feed_forward",
    "integer_matmul",
    "pack_weights",
    "plan_matmul",
    "prompt_heads",
    "quantized_matmul",
    "weight_only_matmul",
]


def integer_matmul(codes, w, a_format):
    """See `operations.integer_matmul`."""
    return _operations().integer_matmul(codes, w, a_format)


def quantized_matmul(x, w, a_format, bias, prologue=None, residual=None, activation=None):
    """See `operations.quantized_matmul`."""
    return _operations().quantized_matmul(x, w, a_format, bias, prologue, residual, activation)


def weight_only_matmul(x, w, bias):
    """See `operations.weight_only_matmul`."""
    return _operations().weight_only_matmul(x, w, bias)


def plan_matmul(m, dtype, w, a_format):
    """See `operations.plan_matmul`."""
    return _operations().plan_matmul(m, dtype, w, a_format)


def pack_weights(w, half_steps, offset, number_format, group_size):
    """See `Backend.pack_weights`; `weight_prep.pack` has what is not served."""
    check_runnable()
    from bipolar_jax.kernels.sm90.weight_prep.pack import pack_columns

    by_kernel, by_xla = (
        functools.partial(pack, number_format=number_format, group_size=group_size)
        for pack in (pack_columns, weights.pack_weights)
    )
    if (params := interpret_params()) is not None:
        return by_kernel(w, half_steps, offset, interpret=params)
    # Models are packed on CPUs, too, beside a GPU that is the default.
    return jax.lax.platform_dependent(w, half_steps, offset, cuda=by_kernel, default=by_xla)


def decode_attention(*args, **options):
    """See `launch.decode_attention`."""
    check_runnable()
    from bipolar_jax.kernels.sm90.decode_attention import launch

    return launch.decode_attention(*args, **options, interpret=interpret_params())


def prompt_heads(*args, **options):
    """See `prompt_projection.prompt_heads`."""
    check_runnable()
    from bipolar_jax.kernels.sm90.projections import prompt_projection

    return prompt_projection.prompt_heads(*args, **options, interpret=interpret_params())


def feed_forward(*args):
    """See `sign_projection.feed_forward`."""
    check_runnable()
    from bipolar_jax.kernels.sm90.projections import sign_projection

    return sign_projection.feed_forward(*args)


def decode_layers(*args, **options):
    """See `layers.operation.decode_layers`."""
    check_runnable()
    from bipolar_jax.kernels.sm90.decode_step import api

    return api.decode_layers(*args, **options, interpret=interpret_params())


def _operations() -> ModuleType:
    check_runnable()
    from bipolar_jax.kernels.sm90.backend import operations

    return operations

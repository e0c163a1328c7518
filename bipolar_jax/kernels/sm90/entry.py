"""The functions of `backend.Backend` on Hopper: products on binary and int8 tensor cores, attention, decode steps.

Each function checks that it can run, then imports its room: importing Pallas takes a second, and not every platform's
jaxlib has the Mosaic GPU dialect. They are a module of their own because rooms have their names: a package's attribute
`decode_attention` is the room once that is imported.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax

from bipolar_jax.kernels.semantics import weights
from bipolar_jax.kernels.sm90.core.execution import check_runnable, interpret_params
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarNumbers, UnpackedArray

__all__ = [
    "decode_attention",
    "decode_layers",
    "decode_rotation_block",
    "feed_forward",
    "integer_matmul",
    "pack_weights",
    "plan_decode_attention",
    "plan_decode_layers",
    "plan_feed_forward",
    "plan_matmul",
    "plan_prompt_heads",
    "prompt_heads",
    "quantized_matmul",
    "weight_only_matmul",
]


def integer_matmul(codes, w, a_format):
    """See `Backend.integer_matmul`, and `operations` for what is not served."""
    return _operations(w).integer_matmul(codes, w, a_format)


def quantized_matmul(x, w, a_format, bias, prologue=None, residual=None, activation=None):
    """See `Backend.quantized_matmul`, and `operations` for what is not served."""
    return _operations(w).quantized_matmul(x, w, a_format, bias, prologue, residual, activation)


def weight_only_matmul(x, w, bias, residual=None, activation=None):
    """See `Backend.weight_only_matmul`, and `operations` for what is not served."""
    return _operations(w).weight_only_matmul(x, w, bias, residual, activation)


def plan_matmul(m, dtype, w, a_format):
    """See `Backend.plan_matmul`."""
    return _operations(w).plan_matmul(m, dtype, w, a_format)


def pack_weights(w, half_steps, offset, number_format, group_size):
    """See `Backend.pack_weights`, and `weight_prep.pack` for what is not served."""
    check_runnable()
    from bipolar_jax.kernels.sm90.weight_prep.pack import pack_columns

    by_kernel, by_xla = (
        functools.partial(pack, number_format=number_format, group_size=group_size)
        for pack in (pack_columns, weights.pack_weights)
    )
    if (params := interpret_params()) is not None:
        return by_kernel(w, half_steps, offset, interpret=params)
    # A model may be packed on the CPU although the default device is a GPU.
    return jax.lax.platform_dependent(w, half_steps, offset, cuda=by_kernel, default=by_xla)


def prompt_heads(x, w, a_format, bias, prologue, keys, values, layer, tables=None, head_norms=None):
    """See `Backend.prompt_heads`, and `prompt_projection` for what is not served."""
    operands = (x, w, a_format, bias, prologue, keys, values, layer, tables, head_norms)
    return _prompt_projection(w).prompt_heads(*operands)


def plan_prompt_heads(*operands, **options):
    """See `Backend.plan_prompt_heads`."""
    return _prompt_projection(operands).plan_prompt_heads(*operands, **options)


def feed_forward(x, up, down, prologue, activation, residual):
    """See `Backend.feed_forward`, and `sign_projection` for what is not served."""
    return _sign_projection(up, down).feed_forward(x, up, down, prologue, activation, residual)


def plan_feed_forward(*operands, **options):
    """See `Backend.plan_feed_forward`."""
    return _sign_projection(operands).plan_feed_forward(*operands, **options)


def decode_attention(projected, keys, values, layer, lengths, *, bits=None, tables=None, slopes=None):
    """See `Backend.decode_attention`, and `decode_attention.launch` for what is not served."""
    options = {"bits": bits, "tables": tables, "slopes": slopes, "interpret": interpret_params()}
    return _decode_attention().decode_attention(projected, keys, values, layer, lengths, **options)


def plan_decode_attention(*operands, **options):
    """See `Backend.plan_decode_attention`."""
    return _decode_attention().plan_decode_attention(*operands, **options)


def decode_rotation_block(ffn, gated):
    """See `ops.decode_rotation_block`."""
    from bipolar_jax.kernels.sm90.decode_step.cooperative.config import rotation_without_exchange

    return rotation_without_exchange(ffn, gated)


def decode_layers(
    hidden,
    kernels,
    biases,
    norms,
    activation,
    keys,
    values,
    lengths,
    tables,
    slopes,
    a_format,
    *,
    cache_bits=None,
    spans=None,
    first_layer=0,
    key_rotation=None,
):
    """See `Backend.decode_layers`, and `decode_step.api` for what is not served."""
    return _decode_step(kernels).decode_layers(
        hidden,
        kernels,
        biases,
        norms,
        activation,
        keys,
        values,
        lengths,
        tables,
        slopes,
        a_format,
        cache_bits=cache_bits,
        spans=spans,
        first_layer=first_layer,
        key_rotation=key_rotation,
        interpret=interpret_params(),
    )


def plan_decode_layers(*operands, **options):
    """See `Backend.plan_decode_layers`."""
    return _decode_step(operands).plan_decode_layers(*operands, **options)


def _check_runnable(*weights: Any) -> None:
    """Raises Unsupported as `check_runnable`, and for unpacked weights."""
    check_runnable()
    leaves = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, BipolarNumbers))
    if any(isinstance(leaf, UnpackedArray) for leaf in leaves):
        raise Unsupported(
            'its kernels do not take unpacked weights: prepare_for_inference(..., layout="planes" or "tensor_cores")'
        )


def _operations(*weights: Any) -> ModuleType:
    _check_runnable(*weights)
    from bipolar_jax.kernels.sm90.backend import operations

    return operations


def _prompt_projection(*weights: Any) -> ModuleType:
    _check_runnable(*weights)
    from bipolar_jax.kernels.sm90.projections import prompt_projection

    return prompt_projection


def _sign_projection(*weights: Any) -> ModuleType:
    _check_runnable(*weights)
    from bipolar_jax.kernels.sm90.projections import sign_projection

    return sign_projection


def _decode_attention() -> ModuleType:
    check_runnable()
    from bipolar_jax.kernels.sm90.decode_attention import launch

    return launch


def _decode_step(*weights: Any) -> ModuleType:
    _check_runnable(*weights)
    from bipolar_jax.kernels.sm90.decode_step import api

    return api

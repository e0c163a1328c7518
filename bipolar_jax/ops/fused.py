"""Operations that fuse several steps of a decoder layer, over whichever backend has a kernel for them.

They serve inference and are not differentiable. `kernels.backend.Backend` documents the operands and the results; each
operation here adds the choice of the backend. Where none serves a request they raise `Unsupported`, and the caller
composes products and attention instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from bipolar_jax.kernels.backend import Backend, Layer
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import BACKENDS, check_implementation, dispatch
from bipolar_jax.ops.matmul import check_operands
from bipolar_jax.packing import BlockScaledArray


def prompt_heads(*operands: Any, implementation: str = "auto", **options: Any) -> Any:
    """Heads of whole prompts, rotated and cached, by the product that makes them; see `Backend.prompt_heads`.

    Raises:
      ValueError: operands that do not fit; an unknown implementation.
      Unsupported: no backend serves this; lists each one's reason.
    """
    return _run("prompt_heads", implementation, operands, options)


def decode_attention(*operands: Any, implementation: str = "auto", **options: Any) -> Any:
    """One new token of each sequence attends to the cache and enters it; see `Backend.decode_attention`.

    Raises: as `prompt_heads`.
    """
    return _run("decode_attention", implementation, operands, options)


def decode_layers(*operands: Any, implementation: str = "auto", **options: Any) -> Any:
    """All layers of a decoder for one new token of each of a few sequences; see `Backend.decode_layers`.

    Raises: as `prompt_heads`.
    """
    return _run("decode_layers", implementation, operands, options)


def decode_rotation_block(ffn_size: int, *, gated: bool = True) -> int:
    """The most numbers that R4 may mix so that `decode_layers` rotates them where gate and up are computed, on an H200.

    There they cost next to nothing; larger blocks cost each block of the kernel the rest of the rotation. 16 for
    Llama-3-8B, 64 for 8192 numbers.

    Args:
      ffn_size: of the input of down, a multiple of 64.
      gated: whether it is made of gate and up.

    Raises:
      ValueError: another size.
    """
    if ffn_size < 64 or ffn_size % 64:
        raise ValueError(f"the decode step serves feed-forward blocks of a multiple of 64 numbers, got {ffn_size}")
    return BACKENDS["sm90"].decode_rotation_block(ffn_size, gated)


def feed_forward(*operands: Any, implementation: str = "auto", **options: Any) -> Any:
    """A feed-forward block whose second product takes one bit a number; see `Backend.feed_forward`.

    Raises: as `prompt_heads`.
    """
    return _run("feed_forward", implementation, operands, options)


def planner(operation: Callable, implementation: str, operands: tuple, options: dict) -> Callable[[Backend], Any]:
    """Checks the operands of a fused operation; returns what asks a backend for its plan.

    Raises:
      ValueError: another function; or as the operation.
    """
    if operation not in (prompt_heads, decode_attention, decode_layers, feed_forward):
        name = getattr(operation, "__name__", repr(operation))
        raise ValueError(
            f"{name:.60} is no operation of bipolar_jax.ops.fused: give one, or x, w and a_bits of a matmul"
        )
    return _checked(operation.__name__, "plan_", implementation, operands, options)


def _run(name: str, implementation: str, operands: tuple, options: dict) -> Any:
    return dispatch(implementation, _checked(name, "", implementation, operands, options), name)


def _checked(name: str, prefix: str, implementation: str, operands: tuple, options: dict) -> Callable[[Backend], Any]:
    check_implementation(implementation)
    _CHECKS.get(name, lambda *_, **__: None)(*operands, **options)
    operands = with_float_scales(operands, abstract=bool(prefix))
    return lambda backend: getattr(backend, prefix + name)(*operands, **options)


def with_float_scales(operands: Any, *, abstract: bool) -> Any:
    """The operands with `BipolarArray`s for every `BlockScaledArray`; `abstract` makes shapes and dtypes alone."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, BlockScaledArray):
            return leaf
        return jax.eval_shape(BlockScaledArray.with_scales, leaf) if abstract else leaf.with_scales()

    return jax.tree.map(convert, operands, is_leaf=lambda node: isinstance(node, BlockScaledArray))


def _check_prompt_heads(x, w, a_format, bias, prologue, *others, **options) -> None:
    check_operands(x, w, a_format, bias, prologue)


def _check_feed_forward(x, up: Layer, down: Layer, prologue, activation, residual) -> None:
    check_operands(x, *up, prologue, activation=activation)
    columns = up.w.shape[-1] // (1 if activation is None else activation.parts)
    check_operands(jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype), *down, residual=residual)


def _check_decode_layers(*operands, **options) -> None:
    leaves = jax.tree.leaves(operands, is_leaf=lambda node: isinstance(node, BlockScaledArray))
    if any(isinstance(leaf, BlockScaledArray) for leaf in leaves):
        raise Unsupported("weights have the scales of a GGUF file, which are multiplied out layer by layer")


_CHECKS = {
    "prompt_heads": _check_prompt_heads,
    "feed_forward": _check_feed_forward,
    "decode_layers": _check_decode_layers,
}

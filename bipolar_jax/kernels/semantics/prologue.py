"""Prologues: the norm, activation function or rotation that a quantizer computes on its input before it rounds.

A prologue maps rows of x to the float32 numbers that are quantized, with no rounding to x's dtype in between. The
functions here are the definition; a backend may sum in another order. Arrays are leaves of a pytree and the rest is
static, so that `jax.vjp` differentiates a prologue.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.quantize.groups import along_last

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x * rsqrt(mean(x^2) + eps) * gain. Source: arXiv 1910.07467.

    Attributes:
      gain: float; may lead with the batch axes of the weights.
      eps: added to the mean square.
      parts: numbers of x for each number that is quantized.
    """

    gain: Float[Array, "*batch k"]
    eps: float = dataclasses.field(metadata=_STATIC)
    parts: ClassVar[int] = 1

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """float32."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.eps) * _vector(self.gain, x.ndim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * gain + bias. Source: arXiv 1607.06450.

    Attributes are those of `RMSNorm`, and `bias`, which is added last.
    """

    gain: Float[Array, "*batch k"]
    bias: Float[Array, "*batch k"]
    eps: float = dataclasses.field(metadata=_STATIC)
    parts: ClassVar[int] = 1

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """float32."""
        x = x.astype(jnp.float32)
        deviation = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(deviation * deviation, axis=-1, keepdims=True)
        normalized = deviation * jax.lax.rsqrt(variance + self.eps)
        return normalized * _vector(self.gain, x.ndim) + _vector(self.bias, x.ndim)


def _vector(vector: Float[Array, "*batch k"], ndim: int) -> Float[Array, "..."]:
    return along_last(vector.astype(jnp.float32), max(ndim, vector.ndim))


Function = Literal["silu", "gelu", "relu"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """function(x); or gated, function(first half of x) * second half of x. Source of gates: arXiv 2002.05202.

    Attributes:
      function: "silu"; "gelu", by its tanh formula; or "relu".
      gated: x has twice as many numbers as the result: the gates, then the numbers that they multiply.
      rotation: of the result, or None. A prologue may have one, the epilogue of a product not.

    Raises:
      ValueError: another function.
    """

    function: Function = dataclasses.field(metadata=_STATIC)
    gated: bool = dataclasses.field(default=False, metadata=_STATIC)
    rotation: Hadamard | None = dataclasses.field(default=None, metadata=_STATIC)

    def __post_init__(self):
        if self.function not in get_args(Function):
            raise ValueError(f"the function must be one of {', '.join(get_args(Function))}, got {self.function!r}")

    @property
    def parts(self) -> int:
        """Numbers of x for each number of the result."""
        return 2 if self.gated else 1

    def __call__(self, x: Float[Array, "*rows columns"]) -> Float[Array, "*rows k"]:
        """float32."""
        x = x.astype(jnp.float32)
        if self.gated:
            gate, up = jnp.split(x, 2, axis=-1)
            numbers = _FUNCTIONS[self.function](gate) * up
        else:
            numbers = _FUNCTIONS[self.function](x)
        return numbers if self.rotation is None else self.rotation(numbers)


_FUNCTIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True), "relu": jax.nn.relu}

Prologue = RMSNorm | LayerNorm | Activation | Hadamard


def rotation_of(prologue: Prologue | None) -> Hadamard | None:
    """The rotation that a prologue ends with, or None."""
    if isinstance(prologue, Activation):
        return prologue.rotation
    return prologue if isinstance(prologue, Hadamard) else None


def check_activation(activation: Activation, columns: int) -> None:
    """Raises ValueError unless it is an `Activation` that fits a product of `columns` columns."""
    if not isinstance(activation, Activation):
        raise ValueError(
            f"the activation must be an Activation, got {type(activation).__name__}: make one with bipolar_jax.ops"
        )
    if activation.rotation is not None:
        raise ValueError("the activation of a product has no rotation: give it to the prologue of the next product")
    if columns % activation.parts:
        raise ValueError(f"a gated activation needs an even number of columns, half of them gates; got {columns}")


def check_prologue(prologue: Prologue, k: int, w_batch: tuple[int, ...]) -> None:
    """Raises ValueError unless it is a prologue whose vectors are floats of shape (k,) or (*w_batch, k)."""
    if not isinstance(prologue, Prologue):
        raise ValueError(
            f"the prologue must be an RMSNorm, a LayerNorm, an Activation or a Hadamard, got "
            f"{type(prologue).__name__}: make one with bipolar_jax.ops"
        )
    rotation = rotation_of(prologue)
    if rotation is not None and rotation.size != k:
        raise ValueError(f"the prologue rotates {rotation.size} numbers, w needs {k=}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(prologue):
        name = f"{type(prologue).__name__}{jax.tree_util.keystr(path)}"
        if leaf.dtype.name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"{name} must be bfloat16, float16 or float32, got {leaf.dtype.name}: cast it first")
        if leaf.shape not in ((k,), (*w_batch, k)):
            raise ValueError(f"{name} has shape {tuple(leaf.shape)}, w needs {(*w_batch, k)} or {(k,)}")

"""Weights that this package and other libraries represent exactly, to compare and time their products in one run.

A weight is S[n] * s[n, g] * (u - 2^(bits - 1)): u a code of `bits` bits, s a small integer, S a power of two. That is a
symmetric integer format with 16-bit scales, and one with integer groups here (o = -s * 2^(bits - 1)), or one scale and
one offset a column.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

import bipolar_jax as bj
from bipolar_jax import BipolarFormat, Precision, explain, from_codes
from bipolar_jax.packing import BipolarArray, PreparedArray
from bipolar_jax.quantize.groups import group_lengths, num_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.planning.queued import Queued, result_shapes, several_calls, take_turns
from experiments.bench.products.shapes import Shape

_SAMPLED = 64  # rows and columns of a product that are compared
_CALLS = 12  # in a program: launching one from Python takes up to 100 us, several times a product of one token
# |product - exact| / |exact|. 8 bits of normal numbers, rounded by each library in its own way, are about 0.01; one
# rounding of the output to bfloat16 is 0.002.
_LARGEST_ERROR = {8: 0.02, None: 0.005}


def check_shareable(precision: Precision) -> None:
    """Raises ValueError unless the weights are of 1 to 8 bits, with groups of 1 to 6, and activations of 8 or 16."""
    if isinstance(precision.w_bits, BipolarFormat) or precision.a_bits not in _LARGEST_ERROR:
        raise ValueError(f"peers have no {precision}: name weights of 1 to 8 bits with A8 or A16, such as W4A8g128")
    if precision.group_size is not None and precision.w_bits > 6:
        raise ValueError(f"{precision} has no integer groups to share with peers: name groups of 1 to 6 bits")


@dataclasses.dataclass(frozen=True)
class SharedProduct:
    """One product with weights that other libraries have, too.

    Attributes:
      shape: sizes.
      precision: bits and groups; of `scales`, both kinds are the same numbers here.
      x: bfloat16 activations.
      codes: of the weights, u.
      scale: s of every group.
      column_scale: S of every column.
    """

    shape: Shape
    precision: Precision
    x: Float[np.ndarray, "m k"]
    codes: UInt8[np.ndarray, "n k"]
    scale: Integer[np.ndarray, "n groups"]
    column_scale: Float[np.ndarray, "n 1"]

    @classmethod
    def random(cls, shape: Shape, precision: Precision, seed: int) -> SharedProduct:
        """Normal activations; codes without the lowest, which formats of a sign and a magnitude lack."""
        rng, bits = np.random.default_rng(seed), precision.w_bits
        x = rng.standard_normal((shape.m, shape.k), np.float32).astype(ml_dtypes.bfloat16)
        codes = rng.integers(min(1, bits - 1), 1 << bits, (shape.n, shape.k), np.uint8)
        largest = 1 << (8 - bits)  # -128 <= s * (u - 2^(bits - 1)) <= 127
        scale = rng.integers(largest // 2 + 1, largest + 1, (shape.n, num_groups(shape.k, precision.group_size)))
        return cls(shape, precision, x, codes, scale, np.exp2(rng.integers(-11, -8, (shape.n, 1))).astype(np.float32))

    @property
    def group_scales(self) -> Float[np.ndarray, "n groups"]:
        """Float scales of all groups, exact in bfloat16."""
        return self.column_scale * self.scale.astype(np.float32)

    def ours(self) -> BipolarArray | PreparedArray:
        """The weights [k, n], laid out for tensor cores where that layout has them."""
        zero = 1 << (self.precision.w_bits - 1)
        if self.precision.group_size is None:
            half = self.group_scales / 2
            packed = from_codes(self.codes, self.precision.w_bits, -1, half, -half)
        else:
            groups = IntegerGroups(
                jnp.asarray(self.scale.astype(np.uint8)), jnp.asarray((-zero * self.scale).astype(np.int8))
            )
            packed = from_codes(
                self.codes, self.precision.w_bits, -1, self.column_scale, None, self.precision.group_size, groups
            )
        try:
            return packed.T.prepare()
        except ValueError:
            return packed.T

    def check(self, product: Float[np.ndarray, "m n"]) -> float:
        """The norm of a product's error in the sample, relative to the exact product's. Raises ValueError if large."""
        if not np.all(np.isfinite(product)):
            raise ValueError("wrong output: not all numbers are finite")
        rows, columns = self._sample
        got = np.asarray(product)[rows][:, columns].astype(np.float64)
        error = float(np.linalg.norm(got - self._exact) / np.linalg.norm(self._exact))
        largest = _LARGEST_ERROR[self.precision.a_bits]
        if not error <= largest:
            raise ValueError(f"wrong output: its error is {error:.2%} of the exact product, more than {largest:.1%}")
        return float(f"{error:.3g}")

    @property
    def _sample(self) -> tuple[Integer[np.ndarray, " rows"], Integer[np.ndarray, " columns"]]:
        return tuple(np.linspace(0, size - 1, min(_SAMPLED, size)).astype(int) for size in (self.shape.m, self.shape.n))

    @functools.cached_property
    def _exact(self) -> Float[np.ndarray, "rows columns"]:
        rows, columns = self._sample
        steps = self.codes[columns].astype(np.float64) - (1 << (self.precision.w_bits - 1))
        lengths = group_lengths(self.shape.k, self.precision.group_size)
        scales = np.repeat(self.group_scales[columns].astype(np.float64), lengths, axis=1)
        return self.x[rows].astype(np.float64) @ (steps * scales).T

    def measure_ours(self, iterations: int) -> dict[str, Any]:
        """Checks and times `bj.matmul` from bf16 to bf16: wall time of queued programs, with gaps between kernels.

        A program has twelve calls as a peer's graph has, so that it is not the host that is timed; CUDA graphs are the
        program's to ask for (`enable_command_buffers`). Each has operands of
        its own, which come from memory; `products` has copies for peers.
        """
        a_format, x, w = self.precision.a_format, jnp.asarray(self.x), self.ours()
        explanation = explain(x, w, a_format)

        def product(x: Array, w: BipolarArray | PreparedArray) -> Array:
            return bj.matmul(x, w, a_bits=a_format)

        operands = tuple(jax.tree.map(jnp.copy, (x, w)) for _ in range(_CALLS))
        like = result_shapes(product, operands)
        queued = Queued.start(several_calls(product).lower(like, *operands).compile(), operands, like)
        error = self.check(np.asarray(queued.results[0], np.float32))
        (timing,) = take_turns({"ours": queued}, iterations).values()
        clock = f"wall around programs of {_CALLS} calls"
        return dataclasses.replace(timing, clock=clock).to_json() | {
            "error_norm": error,
            "implementation": explanation.implementation,
            "kernel": explanation.kernel,
        }

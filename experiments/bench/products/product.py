"""One matrix product (shape and precision): the functions that are timed, their checks, and its lower bound in time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.format import as_format
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.expanded_planning import plan_expanded
from bipolar_jax.kernels.sm90.backend.expanded_products import expanded_tokens_matmul
from bipolar_jax.kernels.sm90.backend.operations import ProductOperands, multiply_words, tokens_matmul
from bipolar_jax.kernels.sm90.backend.planning import Choice, mainloop_steps, plan_product
from bipolar_jax.kernels.sm90.core.execution import check_runnable
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling
from bipolar_jax.ops.dispatch import BACKENDS
from bipolar_jax.packing import BipolarArray, PreparedArray
from experiments.bench.products.operands import Operands, check_integers, check_output
from experiments.bench.products.shapes import Shape

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments

_OUTPUT_BYTES = 2  # bf16


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Peak rates of the device.

    Attributes:
      binary: binary tensor core operations per second.
      int8: int8 tensor core operations per second.
      bf16: bf16 tensor core operations per second.
      bandwidth: bytes read plus written per second.
    """

    binary: float
    int8: float
    bf16: float
    bandwidth: float

    @classmethod
    def of(cls, config: ConfigDict) -> Ceilings:
        """Reads the fields of a config."""
        return cls(**{field.name: float(config[field.name]) for field in dataclasses.fields(cls)})

    def compute_microseconds(self, product: Product) -> float:
        """Lower bound of the tensor cores: all pairs of planes, or one int8 product."""
        if product.kind == "planes":
            return 1e6 * product.shape.operations * product.pairs / self.binary
        return 1e6 * product.shape.operations / self.int8

    def roofline_microseconds(self, product: Product) -> float:
        """Larger of the tensor cores' bound and the time to read both operands and write the result once."""
        return max(self.compute_microseconds(product), 1e6 * product.kernel_bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Product:
    """One precision of one shape.

    Attributes:
      shape: sizes.
      a_format: format of the activations x.
      w_format: format of the weights w.
      implementation: backend; only "sm90" has a kernel that can be timed without the operation.
      group_size: weights along k that share a scale; None is one scale per column.
      integer_groups: whether scales of groups are integers; on Hopper such weights are laid out beforehand.
    """

    shape: Shape
    a_format: BipolarFormat
    w_format: BipolarFormat
    implementation: str
    group_size: int | None = None
    integer_groups: bool = False

    @property
    def has_integers(self) -> bool:
        """Whether the backend's integer product has one number for all groups."""
        return self.group_size is None or self.integer_groups

    @property
    def pairs(self) -> int:
        """Number of pairs of planes."""
        return self.a_format.bits * self.w_format.bits

    @property
    def choice(self) -> Choice:
        """The planner's kernel and tiling."""
        m, n, k = self.shape.m, self.shape.n, self.shape.k
        if self.integer_groups:
            return plan_expanded(m, self._abstract_weights, jnp.bfloat16)
        return plan_product(m, n, k, self.a_format, self.w_format, self.group_size, may_split=True)

    @functools.cached_property
    def _abstract_weights(self) -> BipolarArray | PreparedArray:
        return jax.eval_shape(lambda: self._weights(Operands(self.shape, 0)))

    @property
    def kind(self) -> OperandKind:
        """Operands of the kernel: "planes" or "int8"."""
        return self.choice.kind

    @property
    def has_few_tokens(self) -> bool:
        """Whether the planner chooses the few-token kernel."""
        return isinstance(self.choice.tiling, DecodeTiling)

    @property
    def steps(self) -> int:
        """Length of the main loop, in 128-byte rows of K over all pairs of planes; see `tuning.table`."""
        return mainloop_steps(self.shape.k, self.kind, self.pairs)

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the kernel's operands and output, each counted once."""
        bits_x, bits_w = (self.a_format.bits, self.w_format.bits) if self.kind == "planes" else (8, 8)
        bits_w = self.w_format.bits if self.integer_groups else bits_w
        m, n, k = self.shape.m, self.shape.n, self.shape.k
        return (m * k * bits_x + n * k * bits_w) // 8 + _OUTPUT_BYTES * m * n

    def recovery(self) -> Recovery:
        """The recovery that the operation uses."""
        return Recovery(self.kind, self.a_format, self.w_format, self.shape.k, with_zero=self.a_format.bits > 1)

    def kernel(self, operands: Operands, tiling: Tiling | DecodeTiling | None = None) -> Call:
        """The kernel, from prepared operands to bf16; with the planner's tiling if None."""
        recovery, kind = self.recovery(), self.kind
        tiling = self.choice.tiling if tiling is None else tiling

        def function(x_words, w_words, tokens, columns):
            words = ProductOperands(x_words, w_words, tokens, columns, recovery)
            return multiply_words(tiling, words, jnp.bfloat16)

        return function, (
            operands.x_words(self.a_format, kind),
            operands.w_words(self.w_format, kind),
            operands.tokens(self.a_format),
            operands.column_terms(self.w_format),
        )

    def operation(self, operands: Operands) -> Call:
        """`bj.matmul`, from bf16 activations and packed weights to bf16."""
        a_format, implementation = self.a_format, self.implementation

        def function(x, w):
            return bj.matmul(x, w, a_bits=a_format, implementation=implementation)

        return function, (operands.x, self._weights(operands))

    def _weights(self, operands: Operands) -> BipolarArray | PreparedArray:
        """The weights as a model that is prepared for the backend has them."""
        packed = operands.weights(self.w_format, self.group_size, self.integer_groups)
        return operands.prepared(packed) if self.integer_groups and self.implementation == "sm90" else packed

    def product(self, operands: Operands) -> Call:
        """The operation without the quantizer: from quantized tokens and packed weights to bf16."""
        a_format, choice, expanded = self.a_format, self.choice, self.integer_groups

        def function(tokens, w):
            if expanded:
                return expanded_tokens_matmul(tokens, w, a_format, None, jnp.bfloat16)
            return tokens_matmul(tokens, w, a_format, None, choice, jnp.bfloat16)

        return function, (operands.packed_tokens(a_format, choice.kind), self._weights(operands))

    def integers(self, operands: Operands) -> Call:
        """The backend's integer product; returns only the sampled rows and columns."""
        a_format, backend = self.a_format, BACKENDS[self.implementation]

        def function(codes, w, rows, columns):
            return backend.integer_matmul(codes, w, a_format)[:, :, 0][rows][:, columns]

        return function, (
            operands.codes(a_format),
            self._weights(operands),
            jnp.asarray(operands.rows),
            jnp.asarray(operands.columns),
        )

    def check_integers(self, operands: Operands, function: jax.stages.Compiled) -> int:
        """Compares the compiled `integers` with the exact product; returns the number of compared integers."""
        _, args = self.integers(operands)
        expected = operands.exact_integers(self.a_format, self.w_format, self.group_size)
        check_integers(np.asarray(function(*args)), expected)
        return expected.size

    def check_kernel(self, operands: Operands, output: jax.Array) -> float:
        """Checks an output of `kernel`; returns its largest error, see `check_output`."""
        return check_output(output, operands.sampled(output), operands.exact_output(self.a_format, self.w_format))

    def check_operation(self, operands: Operands, output: jax.Array) -> float:
        """Checks an output of `operation` or `product`; returns its largest error, see `check_output`."""
        exact = operands.exact_operation(self.a_format, self.w_format, self.group_size, self.integer_groups)
        return check_output(output, operands.sampled(output), *exact)


def parse_products(shape: Shape, text: str, implementation: str) -> dict[str, Product]:
    """The products of a shape by precision.

    Args:
      shape: sizes.
      text: precisions such as "W1A2,W1.58A8,W4A8g128,W4A8g128f", or "all" for 1 to 8 bits of both.
      implementation: backend.

    Raises:
      ValueError: other notation, or float activations.
    """
    if text == "all":
        text = ",".join(f"W{w}A{a}" for w in range(1, 9) for a in range(1, 9))
    products = {}
    for item in text.split(","):
        precision = bj.Precision.parse(item)
        if precision.a_bits is None:
            raise ValueError(f"precision {item!r} has float activations: ask for quantized ones, such as W4A8")
        formats = precision.a_format, as_format(precision.w_bits)
        groups = {"group_size": precision.group_size, "integer_groups": precision.scales == "integer"}
        products[str(precision)] = Product(shape, *formats, implementation, **groups)
    return products


def check_device(implementation: str) -> None:
    """Raises ValueError if `implementation` is "sm90" and its kernels cannot run here."""
    if implementation != "sm90":
        return
    try:
        check_runnable()
    except NotImplementedError as reason:
        raise ValueError(f"nothing to measure: {reason}") from reason

"""The functions that the matmul experiments time, for one shape and precision, and the checks that go before."""

from __future__ import annotations

import dataclasses
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
from bipolar_jax.kernels.sm90.backend.operations import multiply_words, tokens_matmul
from bipolar_jax.kernels.sm90.backend.planning import Choice, mainloop_steps, plan_product
from bipolar_jax.kernels.sm90.core.execution import check_runnable
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling
from bipolar_jax.ops.dispatch import BACKENDS
from experiments.bench.products.operands import Operands, check_integers, check_output
from experiments.bench.products.shapes import Shape

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""

_OUTPUT_BYTES = 2  # bf16


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device can do at most, a second: operations of each unit, and bytes read plus written."""

    binary: float
    int8: float
    bf16: float
    bandwidth: float

    @classmethod
    def of(cls, config: ConfigDict) -> Ceilings:
        """From the fields of a config."""
        return cls(**{field.name: float(config[field.name]) for field in dataclasses.fields(cls)})

    def compute_microseconds(self, product: Product) -> float:
        """Least time of the tensor cores for all pairs of planes, or for the bytes."""
        if product.kind == "planes":
            return 1e6 * product.shape.operations * product.pairs / self.binary
        return 1e6 * product.shape.operations / self.int8

    def roofline_microseconds(self, product: Product) -> float:
        """The larger of that and the time to read both operands and write the result once."""
        return max(self.compute_microseconds(product), 1e6 * product.kernel_bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Product:
    """One precision of one shape.

    Attributes:
      shape: sizes.
      a_format: of x.
      w_format: of w.
      implementation: "sm90", or another backend, which has no kernel alone.
      group_size: weights along k that share a scale; None is one scale a column.
    """

    shape: Shape
    a_format: BipolarFormat
    w_format: BipolarFormat
    implementation: str
    group_size: int | None = None

    @property
    def pairs(self) -> int:
        """Products of planes that it takes."""
        return self.a_format.bits * self.w_format.bits

    @property
    def choice(self) -> Choice:
        """What the planner would run."""
        m, n, k = self.shape.m, self.shape.n, self.shape.k
        return plan_product(m, n, k, self.a_format, self.w_format, self.group_size)

    @property
    def kind(self) -> OperandKind:
        return self.choice.kind

    @property
    def steps(self) -> int:
        """Length of the mainloop, in 128-byte rows of K over all pairs of planes; see `tuning.table`."""
        return mainloop_steps(self.shape.k, self.kind, self.pairs)

    @property
    def kernel_bytes(self) -> int:
        """Read and written once by the kernel alone."""
        bits_x, bits_w = (self.a_format.bits, self.w_format.bits) if self.kind == "planes" else (8, 8)
        m, n, k = self.shape.m, self.shape.n, self.shape.k
        return (m * k * bits_x + n * k * bits_w) // 8 + _OUTPUT_BYTES * m * n

    def recovery(self) -> Recovery:
        """As the operation has it."""
        return Recovery(self.kind, self.a_format, self.w_format, self.shape.k, with_zero=self.a_format.bits > 1)

    def kernel(self, operands: Operands, tiling: Tiling | DecodeTiling | None = None) -> Call:
        """The matrix product alone, from packed operands to bf16."""
        recovery, kind = self.recovery(), self.kind
        tiling = self.choice.tiling if tiling is None else tiling

        def function(x_words, w_words, tokens, columns):
            return multiply_words(tiling, x_words, w_words, tokens, columns, recovery, jnp.bfloat16)

        return function, (
            operands.x_words(self.a_format, kind),
            operands.w_words(self.w_format, kind),
            operands.tokens(self.a_format),
            operands.column_terms(self.w_format),
        )

    def operation(self, operands: Operands) -> Call:
        """The public operation: from bf16 activations and packed weights to bf16."""
        a_bits, implementation = self.a_format.bits, self.implementation

        def function(x, w):
            return bj.matmul(x, w, a_bits=a_bits, implementation=implementation)

        return function, (operands.x, operands.weights(self.w_format, self.group_size))

    def product(self, operands: Operands) -> Call:
        """The operation without the quantizer: from packed tokens and weights, which bytes are expanded from."""
        a_format = self.a_format

        def function(tokens, w):
            return tokens_matmul(tokens, w, a_format, None, jnp.bfloat16)

        return function, (operands.packed_tokens(a_format, self.kind), operands.weights(self.w_format, self.group_size))

    def integers(self, operands: Operands) -> Call:
        """The backend's integer product, of which only the sample leaves the device."""
        a_format, backend = self.a_format, BACKENDS[self.implementation]

        def function(codes, w, rows, columns):
            return backend.integer_matmul(codes, w, a_format)[:, :, 0][rows][:, columns]

        return function, (
            operands.codes(a_format),
            operands.weights(self.w_format),
            jnp.asarray(operands.rows),
            jnp.asarray(operands.columns),
        )

    def check_integers(self, operands: Operands, function: jax.stages.Compiled) -> int:
        """Compares the sample of the compiled `integers` with the exact product; returns how many numbers."""
        _, args = self.integers(operands)
        expected = operands.exact_integers(self.a_format, self.w_format)
        check_integers(np.asarray(function(*args)), expected)
        return expected.size

    def check_kernel(self, operands: Operands, output: jax.Array) -> float:
        """Checks a result of `kernel`; returns its largest error, see `check_output`."""
        return check_output(output, operands.sampled(output), operands.exact_output(self.a_format, self.w_format))

    def check_operation(self, operands: Operands, output: jax.Array) -> float:
        """Checks a result of `operation`; returns its largest error."""
        exact = operands.exact_operation(self.a_format, self.w_format, self.group_size)
        return check_output(output, operands.sampled(output), *exact)


def parse_products(shape: Shape, text: str, implementation: str) -> dict[str, Product]:
    """The products of a shape at "W1A2,W1.58A8,W4A8g128", or at "all" 64 pairs, by precision.

    Raises:
      ValueError: other notation, or float activations.
    """
    if text == "all":
        text = ",".join(f"W{w}A{a}" for w in range(1, 9) for a in range(1, 9))
    products = {}
    for item in text.split(","):
        precision = bj.Precision.parse(item)
        if precision.a_bits is None:
            raise ValueError(f"precision {item!r}: only products of quantized activations are measured here")
        formats = BipolarFormat(precision.a_bits), as_format(precision.w_bits)
        products[str(precision)] = Product(shape, *formats, implementation, precision.group_size)
    return products


def check_device(implementation: str) -> None:
    """Raises ValueError if the Hopper kernels are asked for where they cannot run."""
    if implementation != "sm90":
        return
    try:
        check_runnable()
    except NotImplementedError as reason:
        raise ValueError(f"nothing to measure: {reason}") from reason


def raise_if_error(compiled: Any) -> Any:
    """What `compile_all` returned, unless it is an exception: that is raised."""
    if isinstance(compiled, Exception):
        raise compiled
    return compiled

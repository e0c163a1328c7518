"""`DotGeneral`, a `dot_general` with low-bit operands for Flax layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.ops.compiled import as_array, compiled
from bipolar_jax.ops.contraction import Contraction, DimensionNumbers
from bipolar_jax.ops.dispatch import check_implementation
from bipolar_jax.ops.explicit_sharding import MeshAxes, mesh_axes, with_out_sharding
from bipolar_jax.ops.pack_weights import pack_weights
from bipolar_jax.ops.trainable_matmul import GradientPrecision, fenced_matmul, trainable_matmul
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize import Precision, fake_quant
from bipolar_jax.quantize.calibration import Calibration
from bipolar_jax.quantize.clipping import check_clip, clip_tokens
from bipolar_jax.quantize.groups import check_group_size, num_groups
from bipolar_jax.quantize.integer_groups import Scales
from bipolar_jax.quantize.integer_scale_search import range_of_integer_groups
from bipolar_jax.quantize.learned_step import (
    LearnedGroups,
    fake_quant_by_groups,
    fake_quant_by_step_size,
    initial_step_size,
    scale_of_step,
    step_size_length,
)
from bipolar_jax.quantize.rounding import SUPPORTED_DTYPES, calibrate_rows, check_finite, check_float
from bipolar_jax.quantize.weight_norm import WeightNorm, check_weight_norm, normalize_weights

_PRECISION_FIELDS = tuple(field.name for field in dataclasses.fields(Precision))


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`lax.dot_general` with quantized operands and a straight-through gradient.

    It can be given to any layer that takes a `dot_general`:

        nnx.Linear(512, 512, dot_general=bj.DotGeneral(w_bits=2, a_bits=4), rngs=rngs)
        linen.Dense(512, dot_general=bj.DotGeneral(w_bits=2, a_bits=4))
        linen.Dense(512, dot_general_cls=functools.partial(bj.DotGeneral, w_bits=2, a_bits=4))

    One operand is the weights, the other the activations; Flax passes kernels as the right
    operand. Every call quantizes and packs the weights and multiplies as `bipolar_jax.matmul`
    does, so the forward pass runs the kernel that inference runs, on the same integers. A token
    is all the elements of the activations that one output is contracted from; each token has its
    own scale. Scales of weights are shared along the contracted axes, in groups of `group_size`
    if given. The object has no state, so one object can serve any number of layers.

    It can also multiply two activations, such as queries and keys if it is passed to
    `linen.dot_product_attention` as `einsum_dot_general`: then the right operand is quantized to
    `w_bits` like weights. The attention modules of Flax take `qkv_dot_general` and
    `out_dot_general`, which are used in the projections only.

    Attributes:
      w_bits: weight bits 1..8, or `TERNARY`.
      a_bits: activation bits 1..8; None leaves activations float (weight-only).
      group_size: weights that share a scale, see `quantize`.
      calibration: how the scales of weights are chosen, see `quantize`.
      weight_norm: None, "center" or "standardize", see `normalize_weights`.
      clip_gradient: True sets the gradient of clipped weights to 0, see `fake_quant`.
      clip_activations: clips activations to this many times the mean magnitude of their token
        before they are quantized, see `clip_tokens`; None does not clip.
      gradient: precision of the backward pass.
      weights: which operand is the weights, "rhs" or "lhs".
      implementation: the backend, see `bipolar_jax.matmul`.
      scales: of groups, "float" or "integer", see `Precision`. Integer ones are not searched in training: their grids
        span the float ones of the calibration, unless they are learned (`LearnedGroups`).
      a_span: the part of a token's range that its grid spans, see `Precision`; numbers beyond it have the gradient of
        all others.
      a_symmetric: whether a token's grid is symmetric about 0, see `Precision`.

    Raises:
      ValueError: an attribute with another value than the above.
    """

    w_bits: int | BipolarFormat
    a_bits: int | None = None
    group_size: int | None = None
    calibration: Calibration | None = None
    weight_norm: WeightNorm | None = None
    clip_gradient: bool = True
    clip_activations: float | None = None
    gradient: GradientPrecision = GradientPrecision()  # noqa: RUF009 - frozen
    weights: Literal["rhs", "lhs"] = "rhs"
    implementation: str = "auto"
    scales: Scales | None = None
    a_span: float = 1.0
    a_symmetric: bool = False

    def __post_init__(self):
        precision = self.precision  # which checks its fields
        object.__setattr__(self, "w_bits", precision.w_bits)
        object.__setattr__(self, "calibration", precision.calibration)
        object.__setattr__(self, "scales", precision.scales)
        check_weight_norm(self.weight_norm)
        check_clip(self.clip_activations)
        if self.clip_activations is not None and self.a_bits is None:
            raise ValueError(
                f"clip_activations={self.clip_activations} needs quantized activations, got a_bits=None: give a_bits"
            )
        check_implementation(self.implementation)
        if self.weights not in ("rhs", "lhs"):
            raise ValueError(f'weights must be "rhs" or "lhs", got {self.weights!r}')

    @classmethod
    def of(cls, precision: Precision, **options) -> DotGeneral:
        """Makes a `DotGeneral` from a `Precision`, with the other attributes as keyword arguments."""
        return cls(**{name: getattr(precision, name) for name in _PRECISION_FIELDS}, **options)

    @property
    def precision(self) -> Precision:
        """Bits of both operands, groups and calibration."""
        return Precision(**{name: getattr(self, name) for name in _PRECISION_FIELDS})

    def __call__(
        self,
        lhs: Float[Array, "..."],
        rhs: Float[Array, "..."],
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
        *,
        out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
        step_size: Float[Array, "*batch n numbers"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "..."]:
        """Quantizes both operands and computes `lax.dot_general` of them.

        Args:
          lhs, rhs: float32, bfloat16 or float16. If an axis has size 0, the result is zeros.
          dimension_numbers: as for `lax.dot_general`.
          precision: as for `lax.dot_general`, used in the backward pass only; the integer
            product of the forward pass is exact.
          preferred_element_type: dtype of the result; the float32 result is rounded to it once.
          out_sharding: sharding of the result, for meshes with Explicit axes.
          step_size: learned step sizes, used instead of calibrated scales; the shape is that of
            `initial_step_size`.
          key: a PRNG key; required if `gradient.bits` is set.

        Returns:
          An array of the shape and dtype that `lax.dot_general` would return.

        Raises:
          TypeError: dimension numbers that do not fit the operands; the error of JAX.
          ValueError: operands that are not float, or as `bipolar_jax.matmul` and `quantize`.
        """
        lhs, rhs = as_array(lhs), as_array(rhs)
        weights = rhs if self.weights == "rhs" else lhs
        if weights.dtype.name in SUPPORTED_DTYPES and weights.size:
            check_finite(weights, "the weights")
        call = _Call(
            self,
            dimension_numbers=tuple(tuple(tuple(map(int, axes)) for axes in pair) for pair in dimension_numbers),
            gradient=self.gradient if precision is None else dataclasses.replace(self.gradient, precision=precision),
            preferred_element_type=None if preferred_element_type is None else jnp.dtype(preferred_element_type),
        )
        product = functools.partial(_multiply, call)
        if out_sharding is None:
            return with_out_sharding(product, _axes_of_result(lhs, rhs, dimension_numbers), (lhs, rhs, step_size, key))
        # The compiler chooses the sharding of folding and packing; only that of the result is given.
        return jax.sharding.auto_axes(product, out_sharding=out_sharding)(lhs, rhs, step_size, key)

    def _product(self, lhs, rhs, step_size, key, *, dimension_numbers, gradient, preferred_element_type):
        result = _result_of_dot_general(lhs, rhs, dimension_numbers, preferred_element_type)
        if 0 in lhs.shape or 0 in rhs.shape:
            return jnp.zeros(result.shape, result.dtype)
        check_float(lhs, "lhs")
        check_float(rhs, "rhs")
        if self.weights == "lhs":
            dimension_numbers = tuple((right, left) for left, right in dimension_numbers)
            lhs, rhs = rhs, lhs
        contraction = Contraction.of(lhs.shape, rhs.shape, dimension_numbers)
        w = contraction.fold_w(rhs)
        y = trainable_matmul(
            self._tokens(contraction.fold_x(lhs), result.dtype),
            self.fake_quant(w, step_size),
            self._pack(w, step_size, True),
            self.precision.a_format,
            gradient=gradient,
            key=key,
            implementation=self.implementation,
        )
        y = contraction.unfold(y.astype(result.dtype))
        if self.weights == "lhs":
            batch, kept = len(contraction.batch), len(contraction.x_free)
            y = y.transpose(*range(batch), *range(batch + kept, y.ndim), *range(batch, batch + kept))
        return y

    def multiply_packed(
        self,
        x: Float[Array, "..."],
        packed: BipolarArray,
        contraction: Contraction,
        dtype: jnp.dtype,
        *,
        out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
    ) -> Float[Array, "..."]:
        """Multiplies with packed weights, for inference; the result has the bits that `__call__` gives.

        Args:
          x: activations.
          packed: weights that `pack` returned.
          contraction: the contraction of x with the float weights, before they were folded.
          dtype: dtype of the result.
          out_sharding: as for `__call__`.

        Raises:
          ValueError: as `bipolar_jax.matmul`.
        """

        product = functools.partial(_multiply_packed, _PackedCall(self, contraction, jnp.dtype(dtype)))
        if out_sharding is None:
            x_axes = contraction.kept_of_x(mesh_axes(x))
            return with_out_sharding(product, (*x_axes, *[None] * len(contraction.w_free)), (x, packed))
        return jax.sharding.auto_axes(product, out_sharding=out_sharding)(x, packed)

    def _tokens(self, x, dtype):
        """Activations cast to the common dtype of x and the result, and clipped."""
        # Products are float32 at most; a float64 result is widened from it.
        tokens = x.astype(common_float(x.dtype, jnp.float32 if dtype == jnp.float64 else dtype))
        return tokens if self.clip_activations is None else clip_tokens(tokens, self.clip_activations)

    def pack(
        self, w: Float[Array, "*batch k n"], step_size: Float[Array, "*batch n numbers"] | None = None
    ) -> BipolarArray:
        """Normalizes, quantizes and packs weights, as every call does. No gradient passes through it.

        Args:
          w: float weights, with the contracted axes merged into k.
          step_size: learned step sizes, used instead of calibrated scales.

        Raises:
          ValueError: as `quantize`, or step sizes of another shape.
        """
        check_finite(w, "the weights")
        return self._pack(w, step_size)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def _pack(self, w, step_size, for_one_product=False):
        # The barrier keeps XLA from fusing this with preceding operations, which could change a rounding.
        w = jax.lax.optimization_barrier(jax.lax.stop_gradient(w))
        number_format = as_format(self.w_bits)
        check_group_size(w.shape[-2], self.group_size)
        if self.weight_norm is not None:
            # Calibration and packing must read the same bits, so the normalization is computed once.
            w = jax.lax.optimization_barrier(normalize_weights(w.astype(jnp.float32), self.weight_norm))
        rows, groups = jnp.swapaxes(w, -1, -2), None
        if step_size is None and self.scales == "integer":
            scale, groups = range_of_integer_groups(rows, number_format, self.group_size, self.calibration)
            offset = None
        elif step_size is None:
            scale, offset = calibrate_rows(rows, number_format, self.group_size, self.calibration)
        else:
            self._check_step_size(w, step_size)
            step_size, offset = jax.lax.stop_gradient(step_size), None
            if self.scales == "integer":
                scale, groups = LearnedGroups.of_step_size(step_size, number_format).rounded(number_format)
            else:
                scale = scale_of_step(step_size)
        return pack_weights(
            w,
            number_format,
            scale,
            offset,
            self.group_size,
            groups=groups,
            implementation=self.implementation,
            for_one_product=for_one_product,
        )

    def fake_quant(
        self, w: Float[Array, "*batch k n"], step_size: Float[Array, "*batch n numbers"] | None = None
    ) -> Float[Array, "*batch k n"]:
        """The numbers that `pack` represents, float32; differentiable in the weights and the step sizes."""
        w = normalize_weights(w.astype(jnp.float32), self.weight_norm)
        if step_size is None:
            return fake_quant(w, self.w_bits, -2, self.group_size, self.calibration, self.clip_gradient, self.scales)
        self._check_step_size(w, step_size)
        rows, number_format = jnp.swapaxes(w, -1, -2), as_format(self.w_bits)
        if self.scales == "integer":
            learned = LearnedGroups.of_step_size(step_size, number_format)
            rounded = fake_quant_by_groups(rows, learned, number_format, self.group_size)
        else:
            rounded = fake_quant_by_step_size(rows, step_size, number_format, self.group_size)
        return jnp.swapaxes(rounded, -1, -2)

    @functools.partial(jax.jit, static_argnums=0)
    def initial_step_size(self, w: Float[Array, "*batch k n"]) -> Float[Array, "*batch n numbers"]:
        """Initial step sizes for training, float32.

        One for each group (LSQ, arXiv 1902.08153, section 2.1); with integer scales those that `quantize` finds, in the
        order and the units of `LearnedGroups.step_size`.
        """
        rows = jnp.swapaxes(normalize_weights(w.astype(jnp.float32), self.weight_norm), -1, -2)
        number_format = as_format(self.w_bits)
        if self.scales == "integer":
            learned = LearnedGroups.initial(rows, number_format, self.group_size, self.calibration)
            return learned.step_size(number_format)
        return initial_step_size(rows, number_format, self.group_size)

    def _check_step_size(self, w, step_size):
        check_group_size(w.shape[-2], self.group_size)
        groups = num_groups(w.shape[-2], self.group_size)
        expected = (*w.shape[:-2], w.shape[-1], step_size_length(groups, integer=self.scales == "integer"))
        if step_size.shape != expected:
            raise ValueError(f"step sizes have shape {step_size.shape}, weights {w.shape} need {expected}")


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call of a `DotGeneral`."""

    dot_general: DotGeneral
    dimension_numbers: DimensionNumbers
    gradient: GradientPrecision
    preferred_element_type: jnp.dtype | None


@compiled
def _multiply(call: _Call, lhs, rhs, step_size, key):
    options = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    return options.pop("dot_general")._product(lhs, rhs, step_size, key, **options)


@dataclasses.dataclass(frozen=True)
class _PackedCall:
    """What is static in a product with packed weights."""

    dot_general: DotGeneral
    contraction: Contraction
    dtype: jnp.dtype


@compiled
def _multiply_packed(call: _PackedCall, x, packed):
    dot_general, contraction = call.dot_general, call.contraction
    tokens = dot_general._tokens(contraction.fold_x(x), call.dtype)
    y = fenced_matmul(tokens, packed, dot_general.precision.a_format, dot_general.implementation)
    return contraction.unfold(y.astype(call.dtype))


def common_float(first: jnp.dtype, second: jnp.dtype) -> jnp.dtype:
    """The narrowest float dtype that holds both; JAX's own promotion refuses two dtypes under its strict setting."""
    dtypes = {jnp.dtype(first), jnp.dtype(second)}
    wide = dtypes if len(dtypes) == 1 else {*dtypes, jnp.dtype(jnp.float32)}
    return max(wide, key=lambda dtype: dtype.itemsize)


def _axes_of_result(lhs, rhs, dimension_numbers) -> tuple[MeshAxes, ...]:
    """The mesh axes of the result of `lax.dot_general`."""
    contracting, batch = dimension_numbers
    sides = [mesh_axes(operand) for operand in (lhs, rhs)]
    kept = [
        axes[i]
        for axes, *others in zip(sides, contracting, batch, strict=True)
        for i in range(len(axes))
        if i not in {*others[0], *others[1]}
    ]
    return (*[sides[0][i] for i in batch[0]], *kept)


def _result_of_dot_general(lhs, rhs, dimension_numbers, preferred_element_type) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the result of `lax.dot_general`, and its errors."""
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimension_numbers, preferred_element_type=preferred_element_type
    )
    return jax.eval_shape(product, *(jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in (lhs, rhs)))

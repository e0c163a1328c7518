"""A `dot_general` with low-bit operands, for the layers of Flax."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.ops.contraction import Contraction, DimensionNumbers
from bipolar_jax.ops.dispatch import check_implementation
from bipolar_jax.ops.pack_weights import pack_weights
from bipolar_jax.ops.trainable_matmul import GradientPrecision, fenced_matmul, trainable_matmul
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize import Precision, fake_quant
from bipolar_jax.quantize.calibration import Calibration
from bipolar_jax.quantize.clipping import check_clip, clip_tokens
from bipolar_jax.quantize.groups import check_group_size, num_groups
from bipolar_jax.quantize.learned_step import fake_quant_by_step_size, initial_step_size, scale_of_step
from bipolar_jax.quantize.rounding import calibrate_rows, check_finite, check_float
from bipolar_jax.quantize.weight_norm import WeightNorm, check_weight_norm, normalize_weights


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`lax.dot_general` whose operands are quantized; trains by straight-through estimation.

    Give one to any layer that takes a `dot_general`:

        nnx.Linear(512, 512, dot_general=bj.DotGeneral(w_bits=2, a_bits=4), rngs=rngs)
        linen.Dense(512, dot_general=bj.DotGeneral(w_bits=2, a_bits=4))
        linen.Dense(512, dot_general_cls=functools.partial(bj.DotGeneral, w_bits=2, a_bits=4))

    One operand is the weights and the other the activations; Flax passes its kernels as
    the right one. The weights are quantized and packed in every call, and the product is
    `bipolar_jax.matmul`'s: the forward pass is the low-bit kernel that inference runs, on
    the same integers. Activations are quantized per token, a token being what one output
    is contracted from: all contracted axes together. Scales of weights are shared along
    the contracted axes too, in groups of `group_size` if that is given. Nothing is stored
    here, so that an object serves any number of layers.

    A product of two activations, such as attention's logits when this is handed to
    `linen.dot_product_attention` as `einsum_dot_general`, is served as well: then the right
    operand is quantized to `w_bits` as weights are. The attention modules of Flax take
    `qkv_dot_general` and `out_dot_general`, for their projections only.

    Attributes:
      w_bits: weight bits 1..8, or `TERNARY`.
      a_bits: activation bits 1..8; None leaves activations float (weight-only).
      group_size: see `quantize`.
      calibration: see `quantize`.
      weight_norm: None, "center" or "standardize", see `normalize_weights`.
      clip_gradient: whether weights beyond the grid get no gradient, see `fake_quant`.
      clip_activations: bounds activations by so many times their token's mean magnitude before
        they are quantized, see `clip_tokens`; None does not.
      gradient: precision of the backward pass.
      weights: which operand is the weights, "rhs" or "lhs".
      implementation: the backend of `bipolar_jax.matmul`.

    Raises:
      ValueError: values outside the above.
    """

    w_bits: int | BipolarFormat
    a_bits: int | None = None
    group_size: int | None = None
    calibration: Calibration = "absmax"
    weight_norm: WeightNorm | None = None
    clip_gradient: bool = True
    clip_activations: float | None = None
    gradient: GradientPrecision = GradientPrecision()  # noqa: RUF009 - frozen
    weights: Literal["rhs", "lhs"] = "rhs"
    implementation: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "w_bits", self.precision.w_bits)  # checks all that a Precision has
        check_weight_norm(self.weight_norm)
        check_clip(self.clip_activations)
        if self.clip_activations is not None and self.a_bits is None:
            raise ValueError(
                f"clip_activations={self.clip_activations} has no meaning for float activations: give a_bits"
            )
        check_implementation(self.implementation)
        if self.weights not in ("rhs", "lhs"):
            raise ValueError(f'weights must be "rhs" or "lhs", got {self.weights!r}')

    @classmethod
    def of(cls, precision: Precision, **options) -> DotGeneral:
        """From a `Precision`, and the other attributes by name."""
        return cls(precision.w_bits, precision.a_bits, precision.group_size, precision.calibration, **options)

    @property
    def precision(self) -> Precision:
        """Bits of both operands, groups and calibration."""
        return Precision(self.w_bits, self.a_bits, self.group_size, self.calibration)

    def __call__(
        self,
        lhs: Float[Array, "..."],
        rhs: Float[Array, "..."],
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
        *,
        out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
        step_size: Float[Array, "*batch n groups"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "..."]:
        """The product of both operands quantized, where `lax.dot_general` would give that of both as they are.

        Args:
          lhs, rhs: float32, bfloat16 or float16 of any shapes; a size of 0 gives zeros or nothing.
          dimension_numbers: as for `lax.dot_general`.
          precision: likewise, for the backward pass; the integer product of the forward pass
            is exact.
          preferred_element_type: dtype of the result, in which float32 sums are rounded once.
          out_sharding: sharding of the result where mesh axes are Explicit.
          step_size: learned step sizes in place of calibrated scales, of the shape that
            `initial_step_size` gives.
          key: a PRNG key for quantized gradients, `gradient.bits`.

        Returns:
          An array of the shape and dtype that `lax.dot_general` would give.

        Raises:
          TypeError: dimension numbers that do not fit the operands, as JAX words it.
          ValueError: operands that are not float, as `bipolar_jax.matmul` and `quantize`.
        """
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
        product = functools.partial(
            self._product,
            dimension_numbers=dimension_numbers,
            gradient=self.gradient if precision is None else dataclasses.replace(self.gradient, precision=precision),
            preferred_element_type=preferred_element_type,
        )
        if out_sharding is None:
            return product(lhs, rhs, step_size, key)
        # What folds and packs the operands is for the compiler to shard; the result is then as asked for.
        return jax.sharding.auto_axes(product, out_sharding=out_sharding)(lhs, rhs, step_size, key)

    def _product(self, lhs, rhs, step_size, key, *, dimension_numbers, gradient, preferred_element_type):
        result = result_of_dot_general(lhs, rhs, dimension_numbers, preferred_element_type)
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
            self._rows(contraction.fold_x(lhs), result.dtype),
            self.fake_quant(w, step_size),
            self.pack(w, step_size),
            self.a_bits,
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
        """What `__call__` gives for the weights that were packed, to the bit: the product of inference.

        Args:
          x: activations, in the layout that `contraction` has for them.
          packed: what `pack` gave.
          contraction: of x with the weights before they were folded and packed.
          dtype: of the result.
          out_sharding: as for `__call__`.

        Raises:
          ValueError: as `bipolar_jax.matmul`.
        """

        def product(x, packed):
            rows = self._rows(contraction.fold_x(x), dtype)
            y = fenced_matmul(rows, packed, self.a_bits, self.implementation)
            return contraction.unfold(y.astype(dtype))

        if out_sharding is not None:
            product = jax.sharding.auto_axes(product, out_sharding=out_sharding)
        return product(x, packed)

    def _rows(self, x, dtype):
        """Tokens as the product takes them."""
        rows = x.astype(jnp.promote_types(x.dtype, dtype))
        return rows if self.clip_activations is None else clip_tokens(rows, self.clip_activations)

    def pack(
        self, w: Float[Array, "*batch k n"], step_size: Float[Array, "*batch n groups"] | None = None
    ) -> BipolarArray:
        """The packed weights that the product multiplies with; not differentiable.

        Raises:
          ValueError: as `quantize`, or step sizes of another shape.
        """
        check_finite(w, "the weights")
        return self._pack(w, step_size)

    @functools.partial(jax.jit, static_argnums=0)
    def _pack(self, w, step_size):
        # Compiled by itself, as `fenced_matmul` is: what precedes it must not change a rounding.
        w = jax.lax.optimization_barrier(jax.lax.stop_gradient(w))
        number_format = as_format(self.w_bits)
        check_group_size(w.shape[-2], self.group_size)
        if self.weight_norm is not None:
            # All that reads these numbers must get the same, however they were rounded.
            w = jax.lax.optimization_barrier(normalize_weights(w.astype(jnp.float32), self.weight_norm))
        if step_size is None:
            rows = jnp.swapaxes(w, -1, -2)
            scale, offset = calibrate_rows(rows, number_format, self.group_size, self.calibration)
        else:
            self._check_steps(w, step_size)
            scale, offset = scale_of_step(jax.lax.stop_gradient(step_size)), None
        return pack_weights(w, number_format, scale, offset, self.group_size, implementation=self.implementation)

    def fake_quant(
        self, w: Float[Array, "*batch k n"], step_size: Float[Array, "*batch n groups"] | None = None
    ) -> Float[Array, "*batch k n"]:
        """What `pack` stands for, float32, differentiable by the weights and by the step sizes."""
        w = normalize_weights(w.astype(jnp.float32), self.weight_norm)
        if step_size is None:
            return fake_quant(w, self.w_bits, -2, self.group_size, self.calibration, self.clip_gradient)
        return jnp.swapaxes(fake_quant_by_step_size(*self._steps(w, step_size)), -1, -2)

    def initial_step_size(self, w: Float[Array, "*batch k n"]) -> Float[Array, "*batch n groups"]:
        """Step sizes to begin training with (LSQ, arXiv 1902.08153)."""
        rows = jnp.swapaxes(normalize_weights(w.astype(jnp.float32), self.weight_norm), -1, -2)
        return initial_step_size(rows, as_format(self.w_bits), self.group_size)

    def _steps(self, w, step_size):
        self._check_steps(w, step_size)
        return jnp.swapaxes(w, -1, -2), step_size, as_format(self.w_bits), self.group_size

    def _check_steps(self, w, step_size):
        check_group_size(w.shape[-2], self.group_size)
        per_group = (*w.shape[:-2], w.shape[-1], num_groups(w.shape[-2], self.group_size))
        if step_size.shape != per_group:
            raise ValueError(f"step sizes have shape {step_size.shape}, weights {w.shape} need {per_group}")


def result_of_dot_general(lhs, rhs, dimension_numbers, preferred_element_type) -> jax.ShapeDtypeStruct:
    """Shape and dtype that `lax.dot_general` would give; raises what it would."""
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimension_numbers, preferred_element_type=preferred_element_type
    )
    return jax.eval_shape(product, *(jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in (lhs, rhs)))

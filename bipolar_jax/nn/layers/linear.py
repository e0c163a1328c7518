"""Linear layer with packed weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jaxtyping import Array, Float

from bipolar_jax.nn.layers.dense_layout import axes_of, dense_layout, folded_kernel
from bipolar_jax.nn.layers.packed import Packed, PackedModule, folded
from bipolar_jax.nn.layers.promotion import add_bias, compute_dtype
from bipolar_jax.nn.training.dot_general import DotGeneral, common_float
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.ops import Activation, Prologue, matmul
from bipolar_jax.ops.compiled import as_array
from bipolar_jax.ops.contraction import Contraction
from bipolar_jax.packing import BipolarArray, quantize
from bipolar_jax.quantize import Precision

_default_kernel_init = nnx.initializers.lecun_normal()
_default_bias_init = nnx.initializers.zeros_init()


class InputOrder(nnx.Variable):
    """The variable that holds the order in which a layer reads its inputs."""


class Linear(PackedModule):
    """`nnx.Linear` and `nnx.LinearGeneral` with bipolar-INT weights: y = x @ kernel + bias.

    A layer trained with `DotGeneral` gives the bits of its training: the same products in the same
    dtype, and the bias added after the cast. Other layers add the bias in float32 before the cast.
    A stack of layers, with a leading axis on every array, can be scanned or vmapped over.

    Attributes:
      kernel: `Packed` array of logical shape (*stack, *batch, k, n): the contracted axes are merged
        into k, the output axes into n. Of an `nnx.Linear` it is (in_features, out_features). `kernel.shape` is that
        of the float kernel.
      bias: `nnx.Param` of shape (*batch, *out_features), or None.
      precision: the precision of the kernel, and the activation bits.
      implementation: the backend of `bipolar_jax.matmul`.
      in_features, out_features: sizes of the float kernel's axes; ints as those of `nnx.Linear`,
        tuples as those of `nnx.LinearGeneral`.
      axis, batch_axis: the contracted axes of the input, and its batch axes.
      batch_shape: sizes of the batch axes.
      dtype, promote_dtype, preferred_element_type: as in Flax.
      param_dtype: dtype of the float kernel, which takes part in Flax's promotion; None leaves the
        input's dtype.
      trained: the `DotGeneral` of the layer's training, or None.
      learned_steps: True if the scales are trained; then float scales have no offsets.
      order: `InputOrder` of int32 (*stack, k), or None: input order[i] meets row i of the kernel, so that inputs that
        share a scale are neighbours. Such a layer gathers its inputs before it quantizes them, and fuses nothing.
      k_axes: within `jax.shard_map`, the mesh axes that the inputs and the rows are cut over, see `matmul`; or None.
      token_axes: likewise those that the tokens of the outputs, with `k_axes`, or else of the inputs are cut over.
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        precision: Precision | str,
        use_bias: bool = True,
        kernel_init: Any = _default_kernel_init,
        bias_init: Any = _default_bias_init,
        dtype: Any = None,
        param_dtype: Any = None,
        promote_dtype: Any = flax_promote_dtype,
        preferred_element_type: Any = None,
        implementation: str = "auto",
        kernel: BipolarArray | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Initializes a float kernel as `nnx.Linear` does and quantizes it.

        Without `dtype` and `param_dtype` the layer answers in the dtype of its input, because no float kernel takes
        part in the promotion; with them, in Flax's. With a packed `kernel` of shape (*stack, in_features,
        out_features), such as `from_codes` makes, none is initialized; then `rngs` are needed for a bias only.

        Raises:
          ValueError: as `quantize`.
        """
        self.precision = Precision.of(precision)
        self.in_features, self.out_features = in_features, out_features
        self.axis, self.batch_axis, self.batch_shape = (-1,), (), ()
        initial_dtype = jnp.float32 if param_dtype is None else param_dtype
        if kernel is None:
            weights = kernel_init(rngs.params(), (in_features, out_features), initial_dtype)
            kernel = _quantized(weights, self.precision)
        self.kernel = Packed(kernel)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), initial_dtype))
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.implementation = implementation
        self.trained: DotGeneral | None = None
        self.learned_steps = False
        self.order = nnx.data(None)
        self.k_axes: str | tuple[str, ...] | None = None
        self.token_axes: str | tuple[str, ...] | None = None

    @classmethod
    def from_float(
        cls,
        layer: nnx.Linear | nnx.LinearGeneral,
        precision: Precision | str | None = None,
        *,
        implementation: str = "auto",
    ) -> Linear:
        """Quantizes a float layer or a stack of layers; shares its bias.

        Args:
          layer: the float layer; if it was trained with `DotGeneral`, it is quantized as in training.
          precision: the precision to quantize to; may be None for a layer that was trained with
            `DotGeneral`.
          implementation: the backend; "auto" keeps the one that the layer was trained with.

        Raises:
          ValueError: a precision that differs from that of training, or none for a layer that was
            not trained with `DotGeneral`; a `dot_general` of another library; a stack on another
            axis than the first; or as `quantize`.
        """
        if reason := foreign_dot_general(layer):
            raise ValueError(f"{reason}, which a packed layer would drop: set it to jax.lax.dot_general first")
        trained = LayerQuantization.of(layer)
        quantization = LayerQuantization.for_packing(trained, None if precision is None else Precision.of(precision))
        dot_general = quantization.on(implementation).dot_general
        weights = folded_kernel(layer, layer.kernel[...])
        if trained is None:
            packed_kernel = _quantized(weights, dot_general.precision)
        else:
            # In training, the layer casts its kernel to `dtype` before it calls its DotGeneral.
            weights = weights if layer.dtype is None else weights.astype(layer.dtype)
            packed_kernel = dot_general.pack(weights, quantization.step_size)
        packed = cls.from_packed(layer, packed_kernel, dot_general.precision, implementation=dot_general.implementation)
        if trained is not None:
            packed.trained, packed.learned_steps = dot_general, quantization.step_size is not None
        return packed

    @classmethod
    def from_packed(
        cls,
        layer: nnx.Linear | nnx.LinearGeneral,
        kernel: BipolarArray,
        precision: Precision,
        *,
        implementation: str = "auto",
    ) -> Linear:
        """The packed layer for a float one, with this kernel in the layout of `folded_kernel`; shares its bias."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            precision=precision,
            use_bias=False,
            kernel=kernel,
            dtype=layer.dtype,
            param_dtype=layer.kernel[...].dtype,
            promote_dtype=layer.promote_dtype,
            preferred_element_type=layer.preferred_element_type,
            implementation=implementation,
        )
        packed.bias = nnx.data(layer.bias)
        packed.axis, batch_axis, _, _ = axes_of(layer)
        packed.batch_axis, packed.batch_shape = tuple(batch_axis), tuple(batch_axis.values())
        float_shape = (*packed.batch_shape, *sizes(packed.in_features), *sizes(packed.out_features))
        packed.kernel = folded(kernel, float_shape, len(batch_axis) + 2)
        return packed

    @property
    def contracts_last_axis(self) -> bool:
        """Whether the kernel is a matrix that is multiplied with the last axis of the input, as in `nnx.Linear`."""
        return self.axis == (-1,) and not self.batch_axis and len(sizes(self.out_features)) == 1

    def __call__(
        self,
        inputs: Float[Array, "..."],
        prologue: Prologue | None = None,
        residual: Float[Array, "..."] | None = None,
        activation: Activation | None = None,
        *,
        out_sharding: Any = None,
    ) -> Float[Array, "..."]:
        """Computes x @ kernel + bias, optionally with operations before and after it, which are fused if `fuses`.

        Args:
          inputs: activations x, (*batch, columns); columns is `in_features`, or the input width of the
            prologue. Of a layer over other axes, the input of `nnx.LinearGeneral`.
          prologue: a norm or an activation function of x, computed while x is quantized.
          residual: added to the output; it has the output's dtype.
          activation: applied to the product and the bias; a gated one halves the width of the
            output.
          out_sharding: sharding of the output, for meshes with Explicit axes.

        Returns:
          The output (*batch, out), in the dtype of Flax's layer: `preferred_element_type`, or else `dtype`, or else
          that which x and the float parameters promote to.

        Raises:
          ValueError: as `bipolar_jax.matmul`.
        """
        x = as_array(inputs)
        if self.order is not None:
            x = x if prologue is None else prologue(x).astype(x.dtype)
            x, prologue = jnp.take(x, self.order[...], axis=-1), None
        bias = None if self.bias is None else self.bias[...]
        dtype = compute_dtype(self, x, bias)
        result_dtype = jnp.dtype(self.preferred_element_type or dtype)
        if not is_plain(self):
            x = x if prologue is None else prologue(x).astype(x.dtype)
            y = self._product_of_training(x.astype(dtype), dtype, result_dtype, bias, out_sharding)
            y = y if activation is None else activation(y).astype(y.dtype)
            return y if residual is None else residual + y
        if bias is not None:
            result_dtype = common_float(result_dtype, dtype)
        # A prologue is computed in float32 of x as it is; its result is quantized without a cast in between.
        x = x.astype(common_float(x.dtype if prologue is not None else dtype, result_dtype))
        casts = x.dtype != result_dtype
        y = self._matmul(x, bias, prologue, None if casts else residual, activation, out_sharding)
        if not casts:
            return y
        y = y.astype(result_dtype)
        return y if residual is None else residual + y

    def _matmul(self, x, bias, prologue, residual, activation, out_sharding):
        """The fused product, in x's dtype."""
        fixed = {"activation": activation, "k_axes": self.k_axes, "token_axes": self.token_axes}
        fixed["implementation"] = self.implementation
        kernel, a_format = self.kernel.get_value(), self.precision.a_format
        if out_sharding is None:
            return matmul(x, kernel, a_format, bias=bias, prologue=prologue, residual=residual, **fixed)

        def product(x, kernel, bias, prologue, residual):
            return matmul(x, kernel, a_format, bias=bias, prologue=prologue, residual=residual, **fixed)

        return jax.sharding.auto_axes(product, out_sharding=out_sharding)(x, kernel, bias, prologue, residual)

    def _product_of_training(self, x, dtype, result_dtype, bias, out_sharding):
        """The product over any axes, and the bias after the cast, as Flax's layer with a `DotGeneral` computes them."""
        dot_general = self.trained or DotGeneral.of(self.precision)
        dot_general = dataclasses.replace(dot_general, implementation=self.implementation)
        out_features = sizes(self.out_features)
        numbers, bias_shape = dense_layout(x.shape, self.axis, self.batch_axis, out_features)
        kernel_shape = (*self.batch_shape, *sizes(self.in_features), *out_features)
        contraction = Contraction.of(x.shape, kernel_shape, numbers)
        y = dot_general.multiply_packed(
            x, self.kernel.get_value(), contraction, result_dtype, out_sharding=out_sharding
        )
        return y if bias is None else add_bias(y, bias.astype(dtype).reshape(bias_shape))


def fuses(layer: Any) -> bool:
    """Whether a layer is a packed one that runs its prologue, activation and residual within its product.

    Layers that give the bits of their training do not, until `without_training` has made others of them; nor do those
    that read their inputs in another order.
    """
    return is_plain(layer) and layer.order is None


def is_plain(layer: Any) -> bool:
    """Whether a layer is a packed one that is computed by one `matmul`, of its inputs in any order."""
    return isinstance(layer, Linear) and layer.trained is None and layer.contracts_last_axis


def without_training[Model: nnx.Module](model: Model) -> Model:
    """A copy of a layer or model whose packed layers round as if they had not been trained, so that they join and fuse.

    Then the bias is added in float32, and fused operations pass on numbers that training rounds to the model's dtype.
    Layers that clip their activations keep the bits of their training, because no kernel clips.
    """
    model = nnx.clone(model)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and layer.trained is not None and layer.trained.clip_activations is None:
            layer.trained = None
    return model


def _quantized(weights: Float[Array, "*batch k n"], precision: Precision) -> BipolarArray:
    return quantize(weights, precision.w_bits, -2, precision.group_size, precision.calibration, precision.scales)


def foreign_dot_general(layer: nnx.Module) -> str | None:
    """What is wrong with a float layer whose `dot_general` is neither JAX's nor a `DotGeneral`; None if nothing is."""
    if LayerQuantization.of(layer) is not None:
        return None
    for name, usual in (("dot_general", (None, jax.lax.dot_general)), ("dot_general_cls", (None,))):
        found = getattr(layer, name, None)
        if not any(found is each for each in usual):
            return f"its {name} is {getattr(found, '__name__', found)!s}"
    return None


def sizes(features: int | tuple[int, ...]) -> tuple[int, ...]:
    """`in_features` or `out_features` of a layer as a tuple."""
    return (features,) if isinstance(features, int) else tuple(features)

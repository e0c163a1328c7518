"""Packs the kernels of a linen model, and applies the model with them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen

from bipolar_jax.nn.convert.float_layers import warn_of_matched
from bipolar_jax.nn.convert.layer_paths import NOT_WEIGHTS
from bipolar_jax.nn.convert.rules import Rules, chosen_precision, match_rules, trained_precisions
from bipolar_jax.nn.layers.dense_layout import dense_layout
from bipolar_jax.nn.layers.packed import num_bytes
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.nn.training.linen_dot_general import LinenDotGeneral
from bipolar_jax.ops.contraction import Contraction, DimensionNumbers
from bipolar_jax.packing import BipolarArray

_LAYERS = (linen.Dense, linen.DenseGeneral)
_ELIGIBLE = "linen.Dense or linen.DenseGeneral"


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """How a packed layer multiplies.

    Attributes:
      dot_general: how the activations are quantized, and the backend.
      kernel_dtype: dtype of the float kernel, which takes part in Flax's dtype promotion.
    """

    dot_general: DotGeneral
    kernel_dtype: str


class PackedLinen(linen.Module):
    """A linen module that is applied with packed kernels.

    The variables are those of the module, except that each packed kernel is a `BipolarArray`
    [*stack, *batch, k, n] with the contracted axes merged into k and the output axes into n. They
    can be passed to `jit`, `linen.scan` and `bipolar_jax.save`. The module is not changed: calls of
    its packed layers are intercepted. It can be a submodule of other modules, under its own name in
    their variables, and be bound: `packed.bind(variables)(x)`.

    Attributes:
      module: the float model.
      layers: (path, `PackedLayer`) pairs, one for each packed layer.
    """

    module: linen.Module
    layers: tuple[tuple[str, PackedLayer], ...]

    def setup(self):
        """Gives the module this scope, so that its variables have no further level."""
        linen.share_scope(self, self.module)

    def __call__(self, *arguments: Any, method: str = "__call__", **options: Any) -> Any:
        """Calls a method of the module with packed kernels."""
        layers = {"/".join((*self.path, *filter(None, path.split("/")))): layer for path, layer in self.layers}
        with linen.intercept_methods(functools.partial(_intercept_packed, layers)):
            return getattr(self.module, method)(*arguments, **options)

    def apply(self, variables: Any, *arguments: Any, **options: Any) -> Any:
        """Applies the module as `module.apply` does, with packed variables."""
        with linen.intercept_methods(functools.partial(_intercept_packed, dict(self.layers))):
            return self.module.apply(variables, *arguments, **options)


def quantize_linen(
    module: linen.Module,
    rules: Rules | None,
    variables: Any = None,
    *inputs: Any,
    implementation: str = "auto",
    **options: Any,
) -> tuple[PackedLinen, dict]:
    """Packs the kernels of `linen.Dense` and `linen.DenseGeneral` layers by path rules.

    `linen.DenseGeneral` includes the projections of `linen.MultiHeadDotProductAttention`.
    Convolutions and embeddings stay float, with a warning if a rule matches them. The path of a
    layer is the names of modules that lead to its parameters, joined by "/", such as
    "encoder/Dense_0". Layers with a `DotGeneral` or `LinenDotGeneral` are packed at the precision
    of their training and then give the same bits.

    Args:
      module: the model.
      rules: as for `quantize_model`.
      variables: the variables of `module.init`, possibly trained; they are not changed. For
        layers stacked by `linen.scan` or `linen.vmap` the stack must be the first axis.
      inputs, options: further arguments of `module.apply`. The model is traced with them to find
        its layers; nothing is computed.
      implementation: as for `quantize_model`.

    Returns:
      The module that takes packed variables, and the packed variables.

    Raises:
      ValueError: as `quantize_model`; or a wrapper computes with a kernel before its layer does, as
        `linen.WeightNorm` does.
    """
    if variables is None:
        raise ValueError(
            f"{type(module).__name__} is a linen model: give its variables and example inputs after the rules"
        )
    if isinstance(module, PackedLinen):
        raise ValueError("the model is packed already: give its float model, `module`, with the float variables")
    variables = core.unfreeze(linen.meta.unbox(variables))
    if not isinstance(variables, dict) or "params" not in variables:
        found = f"a {type(variables).__name__}" if not isinstance(variables, dict) else f"the keys {sorted(variables)}"
        raise ValueError(f'variables must have the collection "params", as module.init returns it, got {found!s:.100}')
    layers, others = _find_layers(module, variables, inputs, options)
    if rules is None:
        precisions = trained_precisions({path: layer.trained for path, layer in layers.items()})
    else:
        precisions = match_rules(rules, list(layers), {path: name for path, (name, _) in others.items()}, _ELIGIBLE)
        warn_of_matched(
            {path: found for path, found in others.items() if found[1] and chosen_precision(rules, path) is not None},
            stacklevel=4,
        )
    packed = {}
    parameters = jax.tree.map(lambda leaf: leaf, variables["params"])  # copies the dicts, not the arrays
    for path, precision in precisions.items():
        if precision is not None:
            try:
                packed[path] = _pack(parameters, path, layers[path], precision, implementation)
            except ValueError as error:
                raise ValueError(f"cannot quantize layer {path} to {precision}: {error}") from error
    _check_kernels_are_used_as_stored(module, variables, packed, inputs, options)
    return PackedLinen(module, tuple(packed.items())), {**variables, "params": parameters}


@dataclasses.dataclass(frozen=True)
class _DenseLayer:
    """A layer found while tracing the model.

    Attributes:
      num_batch, num_contracted: numbers of batch axes and of contracted axes of the kernel.
      kernel_shape: shape of the kernel in one layer, without the axes of a stack.
      dtype: the layer's `dtype`.
      trained: the quantization of its training, or None.
      step_size_at: name of the submodule that holds learned step sizes, or None.
    """

    num_batch: int
    num_contracted: int
    kernel_shape: tuple[int, ...]
    dtype: Any
    trained: LayerQuantization | None
    step_size_at: str | None


def _find_layers(module, variables, inputs, options) -> tuple[dict[str, _DenseLayer], dict[str, tuple[str, int]]]:
    """The layers that can be packed, and class names and bytes of weights of other layers, by path."""
    layers, others = {}, {}

    def record(next_function, arguments, keywords, context):
        layer, path = context.module, "/".join(context.module.path)
        if isinstance(layer, LinenDotGeneral):
            return jax.lax.dot_general(*arguments[:3])  # only the shape matters, and it needs no PRNG key
        if context.method_name == "__call__":
            if type(layer) in _LAYERS:
                layers[path] = _dense_layer(layer, *arguments, **keywords)
            elif any(not isinstance(value, dict) for value in layer.variables.get("params", {}).values()):
                others[path] = type(layer).__name__, _weight_bytes(layer)
        return next_function(*arguments, **keywords)

    with linen.intercept_methods(record):
        jax.eval_shape(lambda variables: module.apply(variables, *inputs, **options), variables)
    return layers, others


def _weight_bytes(layer: linen.Module) -> int:
    """Bytes of the layer's own parameters that are no biases, and no scales of norms."""
    own = layer.variables["params"].items()
    return sum(num_bytes(value) for name, value in own if name not in NOT_WEIGHTS and getattr(value, "ndim", 0) >= 2)


def _dense_layer(layer: linen.Dense | linen.DenseGeneral, inputs: jax.Array) -> _DenseLayer:
    """Describes a layer that is called with the given inputs."""
    ((axis, _), (batch, _)), kernel_shape, _ = _layout(layer, inputs)
    make, step_size_at = layer.dot_general_cls, None
    dot_general = layer.dot_general
    if isinstance(make, functools.partial) and make.func is LinenDotGeneral:
        stateful = make(parent=None)
        dot_general = stateful.dot_general
        step_size_at = "LinenDotGeneral_0" if stateful.learned_steps else None
    elif make is not None:
        dot_general = make()
    trained = LayerQuantization(dot_general) if isinstance(dot_general, DotGeneral) else None
    return _DenseLayer(len(batch), len(axis), kernel_shape, layer.dtype, trained, step_size_at)


def _pack(parameters: dict, path: str, layer: _DenseLayer, precision, implementation: str) -> PackedLayer:
    """Replaces the float kernel by the packed one, and removes the step sizes, which the scales now contain."""
    quantization = LayerQuantization.for_packing(layer.trained, precision)
    layer_parameters = functools.reduce(dict.__getitem__, path.split("/") if path else [], parameters)
    step_size = layer_parameters.pop(layer.step_size_at)["step_size"] if layer.step_size_at else None
    kernel = layer_parameters["kernel"]
    stack = kernel.shape[: kernel.ndim - len(layer.kernel_shape)]
    if kernel.shape[len(stack) :] != layer.kernel_shape:
        raise ValueError(
            f"its kernel has shape {kernel.shape} and is used as {layer.kernel_shape}: "
            "a stack of layers must be the first axis, variable_axes={'params': 0}"
        )
    batch = layer.kernel_shape[: layer.num_batch]
    k = math.prod(layer.kernel_shape[layer.num_batch : layer.num_batch + layer.num_contracted])
    # In training, the layer casts its kernel to `dtype` before it calls its DotGeneral.
    folded = (kernel if layer.dtype is None else kernel.astype(layer.dtype)).reshape(*stack, *batch, k, -1)
    dot_general = quantization.on(implementation).dot_general
    layer_parameters["kernel"] = dot_general.pack(folded, step_size)
    return PackedLayer(dot_general, kernel.dtype.name)


def _check_kernels_are_used_as_stored(module, variables, packed: dict[str, PackedLayer], inputs, options) -> None:
    """Raises ValueError if anything computes with a kernel on its way to its layer, such as a norm of weights.

    The model is traced once more with PRNG keys as kernels: they can be sliced, scanned and mapped over, but JAX
    refuses arithmetic with them.
    """

    def trace(paths) -> None:
        with linen.intercept_methods(functools.partial(_intercept_keys, {path: packed[path] for path in paths})):
            jax.eval_shape(lambda variables: module.apply(variables, *inputs, **options), _with_keys(variables, paths))

    try:
        trace(packed)
    except Exception as error:
        for path in packed:
            try:
                trace([path])
            except Exception as cause:
                raise ValueError(
                    f"cannot quantize layer {path}: the model computes with its kernel before the layer uses it, as "
                    "linen.WeightNorm, linen.SpectralNorm and linen.map_variables do, and a packed kernel has no "
                    "arithmetic: give it the precision None"
                ) from cause
        raise ValueError(f"the kernels of {', '.join(packed)} cannot be packed together: {error}") from error


def _with_keys(variables: dict, paths) -> dict:
    """The variables with PRNG keys, in the shapes of the kernels, as kernels of these layers."""
    parameters = jax.tree.map(lambda leaf: leaf, variables["params"])
    for path in paths:
        layer = functools.reduce(dict.__getitem__, path.split("/") if path else [], parameters)
        layer["kernel"] = jax.ShapeDtypeStruct(layer["kernel"].shape, jax.random.key(0).dtype)
    return {**variables, "params": parameters}


def _intercept_keys(layers: dict[str, PackedLayer], next_function, arguments, keywords, context):
    """Gives layers whose kernels are PRNG keys an output of the right shape and dtype."""
    layer = context.module
    if isinstance(layer, LinenDotGeneral):
        return jax.lax.dot_general(*arguments[:3])
    packed = layers.get("/".join(layer.path)) if type(layer) in _LAYERS and context.method_name == "__call__" else None
    if packed is None:
        return next_function(*arguments, **keywords)
    (inputs,) = (*arguments, *keywords.values())
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    layer.get_variable("params", "kernel")
    inputs, _, bias = layer.promote_dtype(inputs, jnp.zeros((), packed.kernel_dtype), bias, dtype=layer.dtype)
    numbers, kernel_shape, bias_shape = _layout(layer, inputs)
    y = jax.lax.dot_general(inputs, jnp.zeros(kernel_shape, inputs.dtype), numbers)
    return y if bias is None else y + jnp.reshape(bias, bias_shape)


def _intercept_packed(layers: dict[str, PackedLayer], next_function, arguments, keywords, context):
    """Computes the calls of packed layers with their packed kernels, and passes other calls on."""
    layer = context.module
    if type(layer) not in _LAYERS or context.method_name != "__call__":
        return next_function(*arguments, **keywords)
    kernel = layer.get_variable("params", "kernel")
    packed = layers.get("/".join(layer.path))  # None for a layer of another `PackedLinen`
    if packed is None or not isinstance(kernel, BipolarArray):
        return next_function(*arguments, **keywords)
    return _packed_dense(layer, kernel, packed, *arguments, **keywords)


def _packed_dense(layer: linen.Dense | linen.DenseGeneral, kernel: BipolarArray, packed: PackedLayer, inputs):
    """The output of a layer with a packed kernel, in the dtype of the float layer's output."""
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    placeholder = jnp.zeros((), packed.kernel_dtype)
    inputs, _, bias = layer.promote_dtype(inputs, placeholder, bias, dtype=layer.dtype)
    numbers, kernel_shape, bias_shape = _layout(layer, inputs)
    contraction = Contraction.of(inputs.shape, kernel_shape, numbers)
    y = packed.dot_general.multiply_packed(inputs, kernel, contraction, inputs.dtype)
    return y if bias is None else y + jnp.reshape(bias, bias_shape)


def _layout(
    layer: linen.Dense | linen.DenseGeneral, inputs: jax.Array
) -> tuple[DimensionNumbers, tuple[int, ...], tuple[int, ...]]:
    """Dimension numbers, the shape of the float kernel, and the shape that broadcasts the bias to the output."""
    general = isinstance(layer, linen.DenseGeneral)
    axis, batch = (layer.axis, layer.batch_dims) if general else (-1, ())
    axis, batch, features = (
        (value,) if isinstance(value, int) else tuple(value) for value in (axis, batch, layer.features)
    )
    numbers, bias_shape = dense_layout(inputs.shape, axis, batch, features)
    (axis, _), (batch, _) = numbers
    kernel_shape = (*(inputs.shape[i] for i in (*batch, *axis)), *features)
    return numbers, kernel_shape, bias_shape

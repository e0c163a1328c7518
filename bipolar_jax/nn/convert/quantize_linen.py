"""Linen models with packed kernels among their variables."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen

from bipolar_jax.nn.convert.rules import Rules, decide
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.linen_dot_general import LinenDotGeneral
from bipolar_jax.nn.training.stateful_dot_general import Trained
from bipolar_jax.ops.contraction import Contraction, DimensionNumbers
from bipolar_jax.packing import BipolarArray

_LAYERS = (linen.Dense, linen.DenseGeneral)
_ELIGIBLE = "linen.Dense or linen.DenseGeneral"


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """How one layer of a linen model multiplies: its bits, and the dtype that its kernel had."""

    dot_general: DotGeneral
    kernel_dtype: str


@dataclasses.dataclass(frozen=True)
class PackedLinen:
    """A linen module whose variables may hold a `BipolarArray` in place of a kernel.

    The variables are the module's own but for that: nested dicts, of which each packed
    kernel is a `BipolarArray` [*stack, *batch, k, n], all contracted axes as one and all
    output axes as one. They pass through `jit`, `linen.scan` and `bipolar_jax.save` as they
    are. The module itself stays as it was; the calls of its packed layers are answered here.

    Attributes:
      module: the float model.
      layers: (path, how it multiplies) of every packed layer.
    """

    module: linen.Module
    layers: tuple[tuple[str, PackedLayer], ...]

    def apply(self, variables: Any, *arguments: Any, **options: Any) -> Any:
        """As `module.apply`."""
        with linen.intercept_methods(functools.partial(_answer, dict(self.layers))):
            return self.module.apply(variables, *arguments, **options)


def quantize_linen(
    module: linen.Module,
    rules: Rules | None,
    variables: Any = None,
    *inputs: Any,
    implementation: str = "auto",
    **options: Any,
) -> tuple[PackedLinen, dict]:
    """Packs the kernels of a linen model: `linen.Dense` and `linen.DenseGeneral` by path rules.

    With `linen.DenseGeneral` come the projections of `linen.MultiHeadDotProductAttention`.
    Convolutions and embeddings stay float. A layer's path is the names that lead to its
    parameters joined by "/", such as "encoder/Dense_0". Layers with a `DotGeneral` or
    `LinenDotGeneral` are packed as they were trained, and compute the same numbers to the bit.

    Args:
      module: the model.
      rules: as for `quantize_model`.
      variables: what `module.init` gave, or training made of it; left as they are. Of
        layers stacked by `linen.scan` or `linen.vmap` the stack must be the first axis.
      inputs, options: what `module.apply` takes beside the variables. The model is traced
        with them, to find its layers; nothing is computed.

    Returns:
      The module that reads packed variables, and those.

    Raises:
      ValueError: as `quantize_model`.
    """
    if variables is None:
        raise ValueError(
            f"{type(module).__name__} is a linen model: give its variables and example inputs after the rules"
        )
    variables = core.unfreeze(linen.meta.unbox(variables))
    layers, others = _layers_of(module, variables, inputs, options)
    if rules is None:
        precisions = {path: found.trained.dot_general.precision for path, found in layers.items() if found.trained}
        if not precisions:
            raise ValueError(
                "no layer of the model was trained with DotGeneral, so rules must say what to quantize: "
                '[(".*", Precision.parse("W4A8"))] quantizes every layer'
            )
    else:
        precisions = decide(rules, list(layers), others, _ELIGIBLE)
    packed = {}
    parameters = jax.tree.map(lambda leaf: leaf, variables["params"])  # dicts of our own
    for path, precision in precisions.items():
        if precision is not None:
            try:
                packed[path] = _pack(parameters, path, layers[path], precision, implementation)
            except ValueError as error:
                raise ValueError(f"cannot quantize layer {path} to {precision}: {error}") from error
    return PackedLinen(module, tuple(packed.items())), {**variables, "params": parameters}


@dataclasses.dataclass(frozen=True)
class _Found:
    """A layer met while tracing: its kernel's axes without those of a stack, and what it was trained with."""

    num_batch: int
    num_contracted: int
    kernel_shape: tuple[int, ...]
    dtype: Any
    trained: Trained | None
    step_size_at: str | None


def _layers_of(module, variables, inputs, options) -> tuple[dict[str, _Found], dict[str, str]]:
    """Layers that can be packed by path, and class names of others that have parameters."""
    layers, others = {}, {}

    def look(next_function, arguments, keywords, context):
        layer, path = context.module, "/".join(context.module.path)
        if isinstance(layer, LinenDotGeneral):
            return jax.lax.dot_general(*arguments[:3])  # of the right shape, and no key is needed
        if context.method_name == "__call__":
            if type(layer) in _LAYERS:
                layers[path] = _found(layer, *arguments, **keywords)
            elif any(not isinstance(value, dict) for value in layer.variables.get("params", {}).values()):
                others[path] = type(layer).__name__
        return next_function(*arguments, **keywords)

    with linen.intercept_methods(look):
        jax.eval_shape(lambda variables: module.apply(variables, *inputs, **options), variables)
    return layers, others


def _found(layer: linen.Dense | linen.DenseGeneral, inputs: jax.Array) -> _Found:
    ((axis, _), (batch, _)), kernel_shape, _ = _layout(layer, inputs)
    make, step_size_at = layer.dot_general_cls, None
    dot_general = layer.dot_general
    if isinstance(make, functools.partial) and make.func is LinenDotGeneral:
        stateful = make(parent=None)
        dot_general = stateful.dot_general
        step_size_at = "LinenDotGeneral_0" if stateful.learned_steps else None
    elif make is not None:
        dot_general = make()
    trained = Trained(dot_general) if isinstance(dot_general, DotGeneral) else None
    return _Found(len(batch), len(axis), kernel_shape, layer.dtype, trained, step_size_at)


def _pack(parameters: dict, path: str, found: _Found, precision, implementation: str) -> PackedLayer:
    """Puts the packed kernel in place of the float one; removes step sizes, which the scales now hold."""
    trained = found.trained or Trained(DotGeneral.of(precision))
    if trained.dot_general.precision != precision:
        raise ValueError(
            f"it was trained at {trained.dot_general.precision}: without rules, layers are packed as they were trained"
        )
    holder = functools.reduce(dict.__getitem__, path.split("/") if path else [], parameters)
    step_size = holder.pop(found.step_size_at)["step_size"] if found.step_size_at else None
    kernel = holder["kernel"]
    stack = kernel.shape[: kernel.ndim - len(found.kernel_shape)]
    if kernel.shape[len(stack) :] != found.kernel_shape:
        raise ValueError(
            f"its kernel has shape {kernel.shape} and is used as {found.kernel_shape}: "
            "a stack of layers must be the first axis, variable_axes={'params': 0}"
        )
    batch = found.kernel_shape[: found.num_batch]
    k = math.prod(found.kernel_shape[found.num_batch : found.num_batch + found.num_contracted])
    # The dtype that the layer computes in is what its DotGeneral is given.
    folded = (kernel if found.dtype is None else kernel.astype(found.dtype)).reshape(*stack, *batch, k, -1)
    dot_general = trained.on(implementation).dot_general
    holder["kernel"] = dot_general.pack(folded, step_size)
    return PackedLayer(dot_general, kernel.dtype.name)


def _answer(layers: dict[str, PackedLayer], next_function, arguments, keywords, context):
    """What a packed layer gives; other calls go on as they are."""
    layer = context.module
    if type(layer) not in _LAYERS or context.method_name != "__call__":
        return next_function(*arguments, **keywords)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, BipolarArray):
        return next_function(*arguments, **keywords)
    return _packed_dense(layer, kernel, layers["/".join(layer.path)], *arguments, **keywords)


def _packed_dense(layer: linen.Dense | linen.DenseGeneral, kernel: BipolarArray, packed: PackedLayer, inputs):
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
    """Dimension numbers, the shape of the float kernel, and the shape in which the bias fits the output."""
    general = isinstance(layer, linen.DenseGeneral)
    axis, batch = (layer.axis, layer.batch_dims) if general else (-1, ())
    axis, batch, features = (
        (value,) if isinstance(value, int) else tuple(value) for value in (axis, batch, layer.features)
    )
    axis, batch = (tuple(sorted(i % inputs.ndim for i in axes)) for axes in (axis, batch))
    kernel_batch = tuple(range(len(batch)))
    kernel_axis = tuple(range(len(batch), len(batch) + len(axis)))
    kernel_shape = (*(inputs.shape[i] for i in (*batch, *axis)), *features)
    kept = [inputs.shape[i] if i in batch else 1 for i in range(inputs.ndim) if i not in axis]
    return ((axis, kernel_axis), (batch, kernel_batch)), kernel_shape, (*kept, *features)

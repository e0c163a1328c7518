"""The model in training: float32 parameters by name, and the quantized model that each stage builds from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import BitSchedule

# By path, such as "layers/attention/q_proj/kernel"; float32, stacked over layers.
Params = dict[str, Array]

_DTYPES = ("float32", "bfloat16")
_PACKED = (bj.nn.Linear, bj.nn.Embed)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The structure of a model at one precision, without parameter values.

    Attributes:
      graph: NNX graph definition.
      variables: (path, variable) pairs; parameters hold shapes and dtypes in place of values.
    """

    graph: nnx.GraphDef
    variables: tuple[tuple[tuple, nnx.Variable], ...]

    def model(self, params: Params, key: Array | None = None) -> Transformer:
        """Builds the model, differentiable with respect to `params`.

        Args:
          params: float32 parameters, which are cast to the dtype of the layers.
          key: PRNG key for stochastic rounding of gradients; each layer gets keys of its own. None
            keeps the initial keys, for a model that is not differentiated.
        """
        flat = []
        for index, (path, variable) in enumerate(self.variables):
            name = _name(path)
            if isinstance(variable, nnx.Param):
                variable = variable.replace(params[name].astype(variable.get_value().dtype))
            elif isinstance(variable, nnx.RngKey) and key is not None:
                shape = variable.get_value().shape
                variable = variable.replace(jax.random.split(jax.random.fold_in(key, index), shape))
            flat.append((path, variable))
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


@dataclasses.dataclass(frozen=True)
class Student:
    """The trained model's shapes, precisions over time, and options.

    Attributes:
      config: shapes of the Transformer.
      dtype: dtype of the computation. Parameters stay float32 and are cast in every step, because
        updates are smaller than bfloat16's resolution. Learned step sizes are not cast.
      rules: (pattern, schedule) pairs; the first match decides a layer's precision. Empty for a float model.
      options: keyword arguments of `quantization_aware`.
      initial_embedding: factor on the embedding's random initial weights.
      initial_residual: factor on the random initial weights of layers that add to the residual stream.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    rules: tuple[tuple[str, BitSchedule], ...]
    options: dict[str, Any]
    initial_embedding: float = 1.0
    initial_residual: float = 1.0

    @classmethod
    def of(cls, config: ConfigDict, shapes: TransformerConfig) -> Student:
        """Reads a training config.

        Args:
          config: the fields of configs/tiny_base.py.
          shapes: shapes of the Transformer.

        Raises:
          ValueError: an invalid field, or a rule that a layer cannot be quantized by.
        """
        if config.dtype not in _DTYPES:
            raise ValueError(f"dtype {config.dtype!r} is unknown: use one of {', '.join(_DTYPES)}")
        quantization = config.quantization
        rules = tuple((pattern, parse_stages(stages, quantization.calibration)) for pattern, stages in config.rules)
        options = {
            "weight_norm": quantization.weight_norm or None,
            "clip_gradient": quantization.clip_gradient,
            "clip_activations": quantization.clip_activations or None,
            "gradient": bj.GradientPrecision(bits=quantization.gradient_bits or None),
            "learned_steps": quantization.learned_steps,
        }
        student = cls(
            shapes, jnp.dtype(config.dtype), rules, options, config.initial_embedding, config.initial_residual
        )
        if quantization.learned_steps and len(student.changes) > 1:
            raise ValueError(
                "learned step sizes and their optimizer state would be reset at every change of bits: "
                "give each rule one precision, or set quantization.learned_steps=False"
            )
        params = jax.eval_shape(lambda: student.initial(0))
        for step in student.changes:  # reject impossible precisions before training
            jax.eval_shape(lambda params, step=step: _run_once(*student.stage(step, params)), params)
        return student

    @property
    def changes(self) -> tuple[int, ...]:
        """Steps at which the precision of a layer changes, including 0."""
        return tuple(sorted({0} | {step for _, schedule in self.rules for step in schedule.changes}))

    def initial(self, seed: int) -> Params:
        """Random parameters of the float model (no step sizes)."""
        params = params_of(Transformer(self.config, rngs=nnx.Rngs(seed)))
        return {name: value * self._initial_factor(name) for name, value in params.items()}

    def _initial_factor(self, name: str) -> float:
        module, kind = name.split("/")[-2:]
        if module == "embed":
            return self.initial_embedding
        return self.initial_residual if module in ("o_proj", "down_proj") and kind == "kernel" else 1.0

    def stage(self, step: int, params: Params) -> tuple[Stage, Params]:
        """The model at a training step's precision, and its parameters.

        Args:
          step: number of updates made.
          params: parameters of the float model.

        Returns:
          The stage, and `params` with initial step sizes added if they are learned.
        """
        abstract = nnx.eval_shape(lambda: Transformer(self.config, param_dtype=self.dtype, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(abstract)
        flat = nnx.to_flat_state(state)
        model = nnx.merge(graph, nnx.from_flat_state([(path, v.replace(params[_name(path)])) for path, v in flat]))
        rules = [(pattern, schedule.at(step)) for pattern, schedule in self.rules]
        if any(precision is not None for _, precision in rules):
            rngs = nnx.Rngs(gradient=0) if self.options["gradient"].bits is not None else None
            model = bj.quantization_aware(model, rules, rngs=rngs, **self.options)
            for path, module in nnx.iter_modules(model):
                if path and path[0] == "layers" and getattr(module, "rngs", None) is not None:
                    module.rngs = module.rngs.split(self.config.num_layers)  # one set of keys per stacked layer
        params = params_of(model)
        graph, state = nnx.split(model)
        variables = tuple((path, self._without_value(path, variable)) for path, variable in nnx.to_flat_state(state))
        return Stage(graph, variables), params

    def _without_value(self, path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if not isinstance(variable, nnx.Param):
            return variable
        value = variable.get_value()
        return variable.replace(
            jax.ShapeDtypeStruct(value.shape, value.dtype if path[-1] == "step_size" else self.dtype)
        )


def params_of(model: nnx.Module) -> Params:
    """A model's parameters by path."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def without_step_sizes(params: Params) -> Params:
    """The parameters of the float model: all but learned step sizes."""
    return {name: value for name, value in params.items() if not name.endswith("/step_size")}


def parse_stages(text: str, calibration: str) -> BitSchedule:
    """Reads one precision, "W2A8", or a schedule by first step, "0:float,1000:W4A8,2000:W2A8".

    Raises:
      ValueError: another form, or steps that do not start at 0 and increase.
    """
    stages = []
    for stage in text.split(","):
        step, colon, name = (part.strip() for part in stage.rpartition(":"))
        if colon and not step.isdecimal():
            raise ValueError(f"stage {stage!r} is not of the form 1000:W4A8")
        precision = None if name == "float" else bj.Precision.parse(name, calibration)
        stages.append((int(step or 0), precision))
    return BitSchedule(stages)


def shapes_of(config: ConfigDict, pretrained: PretrainedModel | None, vocab_size: int) -> TransformerConfig:
    """The config of the model: the pretrained one's, or `config.model` with the tokenizer's vocabulary size.

    Raises:
      ValueError: unknown or missing fields, or a window longer than the model's context.
    """
    if pretrained is not None:
        shapes = pretrained.model.config
    else:
        shapes = TransformerConfig.from_dict({**config.model.to_dict(), "vocab_size": vocab_size})
    if config.window_length > shapes.context_length:
        raise ValueError(f"window_length={config.window_length} exceeds the model's context of {shapes.context_length}")
    return shapes


def float_params(model: Transformer, name: str) -> Params:
    """The parameters of a loaded model as float32.

    Args:
      model: a float model.
      name: its name in the config, for the error message.

    Raises:
      ValueError: a layer is packed.
    """
    packed = [path for path, module in nnx.iter_modules(model) if isinstance(module, _PACKED)]
    if packed:
        raise ValueError(
            f"{name} has packed layers (such as {'/'.join(map(str, packed[0]))}): training starts from a float model"
        )
    return {path: value.astype(jnp.float32) for path, value in params_of(model).items()}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _run_once(stage: Stage, params: Params) -> Array:
    return stage.model(params)(jnp.zeros((1, 2), jnp.int32))

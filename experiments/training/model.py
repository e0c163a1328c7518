"""The model in training: float32 parameters by name, of which each stage of a run makes its quantized model."""

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

# Names are paths such as "layers/attention/q_proj/kernel"; arrays are float32 and stacked over layers.
Params = dict[str, Array]

_DTYPES = ("float32", "bfloat16")
_PACKED = (bj.nn.Linear, bj.nn.LinearGeneral, bj.nn.Embed)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model without its parameters: what layers there are and what they multiply with.

    Attributes:
      graph: of the NNX model.
      variables: its variables by path; the values of parameters are shapes.
    """

    graph: nnx.GraphDef
    variables: tuple[tuple[tuple, nnx.Variable], ...]

    def model(self, params: Params, key: Array | None = None) -> Transformer:
        """The model of these parameters, rounded to what its layers compute in; differentiable by them.

        Args:
          params: float32.
          key: for quantized gradients: each layer that draws gets keys of its own. None leaves
            those of the beginning, for models that are not differentiated.
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
    """What is trained, and at which precision when.

    Attributes:
      config: shapes of the Transformer.
      dtype: what layers compute in. Parameters are kept in float32 and rounded to it in every
        step, since updates are smaller than bfloat16's steps. Learned step sizes stay float32.
      rules: (pattern, schedule) pairs, the first that matches a layer decides; none for a float model.
      options: of `quantization_aware`.
      initial_embedding: factor of the embedding's random weights.
      initial_residual: likewise of the layers that add to the residual stream.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    rules: tuple[tuple[str, BitSchedule], ...]
    options: dict[str, Any]
    initial_embedding: float = 1.0
    initial_residual: float = 1.0

    @classmethod
    def of(cls, config: ConfigDict, shapes: TransformerConfig) -> Student:
        """Reads `dtype`, `rules` and `quantization`, see configs/tiny_base.py.

        Raises:
          ValueError: values that they cannot have, or layers that cannot be quantized so.
        """
        if config.dtype not in _DTYPES:
            raise ValueError(f"dtype {config.dtype!r} is unknown: use one of {', '.join(_DTYPES)}")
        how = config.quantization
        rules = tuple((pattern, parse_stages(stages, how.calibration)) for pattern, stages in config.rules)
        options = {
            "weight_norm": how.weight_norm or None,
            "clip_gradient": how.clip_gradient,
            "clip_activations": how.clip_activations or None,
            "gradient": bj.GradientPrecision(bits=how.gradient_bits or None),
            "learned_steps": how.learned_steps,
        }
        student = cls(
            shapes, jnp.dtype(config.dtype), rules, options, config.initial_embedding, config.initial_residual
        )
        if how.learned_steps and len(student.changes) > 1:
            raise ValueError(
                "learned_steps begin anew at every change of bits, and their optimizer's state with them: "
                "give each rule one precision, or set quantization.learned_steps=False"
            )
        params = jax.eval_shape(lambda: student.initial(0))
        for step in student.changes:  # what cannot be done is refused before anything is trained
            jax.eval_shape(lambda params, step=step: _run_once(*student.stage(step, params)), params)
        return student

    @property
    def changes(self) -> tuple[int, ...]:
        """Steps at which the precision of a layer changes, 0 among them."""
        return tuple(sorted({0} | {step for _, schedule in self.rules for step in schedule.changes}))

    def initial(self, seed: int) -> Params:
        """Random parameters, without step sizes."""
        params = params_of(Transformer(self.config, rngs=nnx.Rngs(seed)))
        return {name: value * self._initial_factor(name) for name, value in params.items()}

    def _initial_factor(self, name: str) -> float:
        module, kind = name.split("/")[-2:]
        if module == "embed":
            return self.initial_embedding
        return self.initial_residual if module in ("o_proj", "down_proj") and kind == "kernel" else 1.0

    def stage(self, step: int, params: Params) -> tuple[Stage, Params]:
        """The model of a training step, and its parameters: with step sizes, if they are learned.

        Args:
          step: updates made so far.
          params: of the float model.
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
                    module.rngs = module.rngs.split(self.config.num_layers)  # keys for each layer of the stack
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
    """Parameters by name."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def without_step_sizes(params: Params) -> Params:
    """Parameters of the float model."""
    return {name: value for name, value in params.items() if not name.endswith("/step_size")}


def parse_stages(text: str, calibration: str) -> BitSchedule:
    """`W2A8`, or `0:float,1000:W4A8,2000:W2A8`: precisions by the steps at which they begin.

    Raises:
      ValueError: another form, or steps that do not begin at 0 and increase.
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
    """The model's config: a pretrained one's, or that of `config.model` with the tokenizer's vocabulary.

    Raises:
      ValueError: fields that are unknown or missing, or windows longer than the context.
    """
    if pretrained is not None:
        shapes = pretrained.model.config
    else:
        shapes = TransformerConfig.from_dict({**config.model.to_dict(), "vocab_size": vocab_size})
    if config.window_length > shapes.context_length:
        raise ValueError(f"window_length={config.window_length} exceeds the model's context of {shapes.context_length}")
    return shapes


def float_params(model: Transformer, name: str) -> Params:
    """Parameters of a model that was loaded by that name, float32.

    Raises:
      ValueError: some of its layers are packed.
    """
    packed = [path for path, module in nnx.iter_modules(model) if isinstance(module, _PACKED)]
    if packed:
        raise ValueError(
            f"{name} has packed layers ({'/'.join(map(str, packed[0]))} for one): training starts from a float model"
        )
    return {path: value.astype(jnp.float32) for path, value in params_of(model).items()}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _run_once(stage: Stage, params: Params) -> Array:
    return stage.model(params)(jnp.zeros((1, 2), jnp.int32))

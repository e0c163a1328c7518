"""The loss and the step of distillation after rounding.

The student's token probabilities learn from those of the float model (KL divergence; Hinton et al. 2015, arXiv
1503.02531), on text that the float model wrote itself (LLM-QAT, Liu et al. 2023, arXiv 2305.17888). It begins at what
calibration found, so rates are low: a step moves a latent weight by a hundredth to a thousandth of a grid step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from bipolar_jax.compress.distillation.learning_model import Learned, Student, StudentLayout, is_latent
from bipolar_jax.format import as_format
from bipolar_jax.nn import distillation_loss
from bipolar_jax.quantize import Precision
from bipolar_jax.quantize.straight_through import straight_through

# Steps and learning rates that were found on SmolLM2-135M, by bits of weights and by those of activations: a model
# takes the larger ones of its two rows. A step has 16 windows of 512 tokens.
_OF_WEIGHTS = {1: (2400, 4e-4), 2: (3000, 3e-4), 3: (1200, 1e-4), 4: (900, 2e-5)}
_OF_ACTIVATIONS = {1: (3000, 3e-4), 2: (3000, 3e-4), 3: (1500, 1e-4), 4: (1500, 1e-4)}
_OTHERWISE = (300, 1e-5)
# Of 4 bits with one scale a channel: more was lost, and steps are larger.
_PER_CHANNEL = (1300, 3e-5)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How fast it learns: linear warm-up, then cosine decay to 0.

    Attributes:
      steps: updates.
      learning_rate: the peak, of latent weights.
      warmup: updates of the warm-up.
      scale_rate: times the learning rate is that of scales, offsets, norms and biases.
      clip_norm: largest global norm of the gradient.

    Raises:
      ValueError: numbers outside these ranges.
    """

    steps: int
    learning_rate: float
    warmup: int = 50
    scale_rate: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup={self.warmup} must be at least 0 and below steps={self.steps}")
        for name in ("learning_rate", "scale_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    @classmethod
    def of(cls, precision: Precision, **changes: float) -> Schedule:
        """That of a precision: the fewer bits, the more steps at a higher rate; `changes` are fields of others."""
        weights = _OF_WEIGHTS.get(as_format(precision.w_bits).bits, _OTHERWISE)
        if weights == _OF_WEIGHTS[4] and precision.group_size is None:
            weights = _PER_CHANNEL
        steps, rate = map(max, weights, _OF_ACTIVATIONS.get(precision.a_bits, _OTHERWISE))
        return cls(**{"steps": steps, "learning_rate": rate} | changes)

    def rate(self, step: int) -> float:
        """The learning rate of the update after `step` others."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


# Adam (arXiv 1412.6980) without decay of weights; gradients of single weights are far below its usual epsilon, 1e-8.
_ADAM = optax.scale_by_adam(0.9, 0.95, eps=1e-10)


def window_loss(student: nnx.Module, teacher: nnx.Module, ids: Int[Array, "windows length"]) -> Float[Array, ""]:
    """The mean KL(teacher || student) of a next token, in nats, differentiated by the student's hidden states.

    Both models have `hidden_states(ids)` and `logits(hidden)`, as `models.Transformer`. The logits, the largest arrays
    by far, are those of one window at a time, and their gradient is taken at once, while they are there. The output
    layer itself has none.
    """
    hidden = student.hidden_states(ids), teacher.hidden_states(ids)

    @jax.value_and_grad
    def one_window(learning, float_ones):
        return distillation_loss(student.logits(learning), teacher.logits(float_ones))

    losses, gradients = jax.lax.map(lambda pair: one_window(*pair), jax.lax.stop_gradient(hidden))
    # As the chain rule has it: the mean's derivative by a hidden state is the gradient here, which is a constant.
    linear = jnp.sum(hidden[0].astype(jnp.float32) * gradients.astype(jnp.float32)) / len(losses)
    return straight_through(jnp.mean(losses), linear)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillationState:
    """What a step updates.

    Attributes:
      params: by path, see `Student`.
      optimizer: Adam's moments, and the number of updates.
    """

    params: Learned
    optimizer: optax.ScaleByAdamState

    @classmethod
    def of(cls, params: Learned) -> DistillationState:
        """Before the first step. Copies the numbers: steps donate their state."""
        params = {name: jnp.array(value) for name, value in params.items()}
        return cls(params, _ADAM.init(params))


class Step:
    """One update: `step(state, windows, schedule, done)` returns the new state and the metrics; the state is donated.

    It is one compiled program, which all schedules share, and all students of one layout. The metrics "loss" and
    "gradient_norm" are those before the update.

    Attributes:
      student: what learns; of shapes alone it can be compiled.
      teacher: the float model.
      parts: the windows of a step are run in so many parts, one after the other, where all activations of all layers
        would take too much memory; it divides their number.
      mesh: devices that divide the windows between them; each has the whole of what learns, and of the teacher. None
        for one device.
    """

    def __init__(self, student: Student, teacher: nnx.Module, *, parts: int = 1, mesh: Mesh | None = None):
        self.student, self.teacher, self.parts, self.mesh = student, teacher, parts, mesh
        self._constants = self._whole((student.rest, teacher))

    def _whole(self, arrays: Any) -> Any:
        """The arrays, or their shapes, on every device."""
        if self.mesh is None:
            return arrays
        sharding = NamedSharding(self.mesh, PartitionSpec())

        def place(leaf):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return jax.device_put(leaf, sharding)

        return jax.tree.map(place, arrays)

    def __call__(
        self, state: DistillationState, ids: Int[Array, "windows length"], schedule: Schedule, done: int
    ) -> tuple[DistillationState, dict[str, Float[Array, ""]]]:
        """The update after `done` others."""
        rate = schedule.rate(done)
        rates = np.float32([rate, rate * schedule.scale_rate, schedule.clip_norm])
        ids = jnp.asarray(ids, jnp.int32)
        return _update(self.student.layout, self.parts, self.mesh, self._whole(state), *self._constants, ids, rates)

    def compile(self, windows: int, length: int) -> None:
        """Compiles the program for batches of this shape; calls find it, whichever thread has compiled it."""
        state = self._whole(jax.eval_shape(DistillationState.of, self.student.params))
        ids, rates = jax.ShapeDtypeStruct((windows, length), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.float32)
        _update.lower(self.student.layout, self.parts, self.mesh, state, *self._constants, ids, rates).compile()


def _loss_and_gradient(layout: StudentLayout, parts: int, params: Learned, rest, teacher, ids):
    def loss(params, ids):
        return window_loss(layout.model(params, rest), teacher, ids)

    def add_part(sums, ids):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, ids)), None

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    # XLA makes no loop of one part.
    sums, _ = jax.lax.scan(add_part, zeros, ids.reshape(parts, -1, ids.shape[-1]))
    return jax.tree.map(lambda array: array / parts, sums)


@functools.partial(jax.jit, static_argnames=("layout", "parts", "mesh"), donate_argnames="state")
def _update(layout: StudentLayout, parts: int, mesh: Mesh | None, state: DistillationState, rest, teacher, ids, rates):
    function = functools.partial(_loss_and_gradient, layout, parts)
    if mesh is not None:
        of_device, axes, whole = function, mesh.axis_names, PartitionSpec()

        def function(*arguments):
            return jax.lax.pmean(of_device(*arguments), axes)

        specs = {"in_specs": (whole, whole, whole, PartitionSpec(axes)), "out_specs": whole}
        function = jax.shard_map(function, mesh=mesh, **specs, check_vma=False)
    loss_of_all, gradient = function(state.params, rest, teacher, ids)
    norm = optax.tree.norm(gradient)
    rate, scale_rate, clip_norm = rates
    shrink = clip_norm / jnp.maximum(norm, clip_norm)
    gradient = jax.tree.map(lambda array: array * shrink, gradient)
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to an int32
        moved, optimizer = _ADAM.update(gradient, state.optimizer, state.params)
    params = {
        name: value - (rate if is_latent(name) else scale_rate) * moved[name] for name, value in state.params.items()
    }
    return DistillationState(params, optimizer), {"loss": loss_of_all, "gradient_norm": norm}

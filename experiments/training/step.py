"""One training step: loss, gradient, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import adamw, distillation_loss

from .model import Params, Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step updates.

    Attributes:
      params: float32, by path.
      optimizer: optax state, including the step count of the learning-rate schedule.
      key: PRNG key as uint32 Threefry data; replaced by every step.
    """

    params: Params
    optimizer: Any
    key: Array


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warmup, then cosine decay to `final_fraction` of the peak (arXiv 1608.03983, without restarts).

    Raises:
      ValueError: `warmup_steps` is negative or not below `steps`.
    """
    if not 0 <= config.optimizer.warmup_steps < config.steps:
        raise ValueError(
            f"warmup_steps={config.optimizer.warmup_steps} must be at least 0 and below steps={config.steps}"
        )
    peak = config.optimizer.learning_rate
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.optimizer.warmup_steps else peak,
        peak,
        config.optimizer.warmup_steps,
        config.steps,
        peak * config.optimizer.final_fraction,
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """`bipolar_jax.nn.adamw` with the config's settings and schedule."""
    optimizer = config.optimizer
    return adamw(
        make_schedule(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        decay_embeddings=optimizer.decay_embeddings,
        step_size_rate=optimizer.step_size_rate,
    )


def initial_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. Copies `params`: steps donate their buffers, which a teacher may share."""
    params = {name: jnp.array(value) for name, value in params.items()}
    return TrainState(params, optimizer.init(params), jax.random.key_data(jax.random.key(seed)))


def make_step(
    stage: Stage, optimizer: optax.GradientTransformation, distillation: ConfigDict, shardings: Any = None
) -> Callable[[TrainState, Int[Array, "batch length"], Transformer | None], tuple[TrainState, dict[str, Array]]]:
    """A jitted function (state, ids, teacher) -> (state, metrics), which donates the state.

    The loss is the mean cross entropy over all tokens but the first of each window. With a teacher it is
    (1 - weight) * cross entropy + weight * `distillation_loss`, with weight = distillation.weight.
    The metrics are float32 scalars and refer to the parameters before the update. `shardings` are those of a state on a
    mesh, which keeps them; None is one device.
    """

    def loss_of(params, key, ids, teacher):
        logits = stage.model(params, key)(ids)[:, :-1]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
        if teacher is None:
            return entropy, entropy
        softened = distillation_loss(logits, teacher(ids)[:, :-1], distillation.temperature)
        return (1 - distillation.weight) * entropy + distillation.weight * softened, entropy

    def step(state, ids, teacher=None):
        key, used = jax.random.split(jax.random.wrap_key_data(state.key))
        (loss, entropy), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params, used, ids, teacher)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "cross_entropy": entropy, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(params, optimizer_state, jax.random.key_data(key)), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    replicated = NamedSharding(shardings.key.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))

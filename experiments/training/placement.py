"""Where training keeps its arrays: on one device, or cut over a mesh of one process or several."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from bipolar_jax.models.sharding.plan import DATA
from bipolar_jax.models.sharding.training import TrainingPlan, plan_training
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.packing.host_memory import on_host

from .model import Params, Stage
from .step import TrainState, initial_state


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where parameters, the optimizer's state and batches are.

    Attributes:
      mesh: with the axes "data" and "model"; None is one device.
      plan: how parameters are cut; None without a mesh.
    """

    mesh: Mesh | None = None
    plan: TrainingPlan | None = None

    @classmethod
    def of(cls, mesh: Mesh | None, stages: list[tuple[Stage, Params]], batch_size: int) -> Placement:
        """The placement for all stages of a run, whose groups may differ: what any of them leaves whole is whole.

        Raises:
          ValueError: as `plan_training`; a batch that does not divide over "data".
        """
        if mesh is None:
            return cls()
        plan = plan_training([jax.eval_shape(stage.model, params) for stage, params in stages], mesh.shape)
        data = mesh.shape[DATA]
        if batch_size % data:
            raise ValueError(
                f"batch_size={batch_size} does not divide over config.mesh.data={data} devices: "
                f"use a multiple of {data}, such as {-(-batch_size // data) * data}"
            )
        return cls(mesh, plan)

    def teacher(self, model: Transformer) -> Transformer:
        """A float model, placed by a plan of its own. Raises ValueError as `plan_training`."""
        if self.mesh is None:
            return model
        plan = plan_training([model], self.mesh.shape)
        graph, state = nnx.split(model)
        flat = []
        for path, variable in nnx.to_flat_state(state):
            value = variable.get_value()
            spec = plan.spec("/".join(map(str, path)), value.ndim)
            flat.append((path, variable.replace(self._put(value, NamedSharding(self.mesh, spec)))))
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def _params(self, params: Params) -> Params:
        """Parameters of the host or of one device, the same in every process, placed on the mesh."""
        return {
            name: self._put(value, NamedSharding(self.mesh, self.plan.spec(name, value.ndim)))
            for name, value in params.items()
        }

    def state(self, params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
        """`initial_state` of `params`, placed."""
        if self.mesh is None:
            return initial_state(params, optimizer, seed)
        shardings = self.shardings(jax.eval_shape(lambda params: initial_state(params, optimizer, seed), params))
        return jax.jit(lambda params: initial_state(params, optimizer, seed), out_shardings=shardings)(
            self._params(params)
        )

    def shardings(self, state: Any) -> Any:
        """The shardings of a state's leaves: parameters, and the optimizer's moments of each; None without a mesh."""
        if self.mesh is None:
            return None
        names = set(state.params)

        def of(path, leaf):
            keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in names]
            if not keys or state.params[keys[-1]].shape != leaf.shape:
                return NamedSharding(self.mesh, PartitionSpec())
            is_parameter = path[0] == jax.tree_util.GetAttrKey("params")
            spec = self.plan.spec(keys[-1], leaf.ndim) if is_parameter else self.plan.moment_spec(keys[-1], leaf.shape)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(of, state)

    def restored(self, state: TrainState) -> TrainState:
        """A state of the host, the same in every process, placed."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, state)
        return jax.tree.map(self._put, state, self.shardings(state))

    def batch(self, ids: Any) -> Int[Array, "batch length"]:
        """Token ids, the same in every process, divided over "data"."""
        ids = np.asarray(ids, np.int32)
        return self._put(ids, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(DATA)))

    def one_device(self, params: Params) -> Params:
        """The parameters on one device of this process: all processes call this."""
        return params if self.mesh is None else {name: jnp.asarray(on_host(value)) for name, value in params.items()}

    def _put(self, array: Any, sharding: NamedSharding | None) -> Array:
        if sharding is None:
            return jnp.asarray(array)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

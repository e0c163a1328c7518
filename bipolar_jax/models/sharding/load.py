"""A model's file, read straight into the devices of a mesh."""

from __future__ import annotations

import os
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bipolar_jax.models.checkpoint import load_model
from bipolar_jax.models.inference.prepare import Layout
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.sharding.plan import plan_shards
from bipolar_jax.models.sharding.sharded_transformer import shard_model, two_axes
from bipolar_jax.models.transformer import Transformer


def load_sharded(
    path: str | os.PathLike[str],
    mesh: Mesh,
    dtype: Any = None,
    *,
    bits: int | None = None,
    param_dtype: Any = None,
    layout: Layout | None = None,
) -> PretrainedModel:
    """`shard_model(load_model(path), mesh)`, where no host has more of the packed weights than its devices.

    A file that was written from any mesh, or from one device, loads on any other.

    Args:
      path: a file that `save_model` wrote.
      mesh: see `shard_model`.
      dtype, layout: as for `prepare_for_inference`.
      bits, param_dtype: as for `load_model`.

    Raises: as `load_model` and `shard_model`.
    """
    loaded = load_placed(path, mesh, bits=bits, param_dtype=param_dtype)
    return shard_model(loaded, mesh, dtype, layout=layout)


def load_placed(
    path: str | os.PathLike[str], mesh: Mesh, *, bits: int | None = None, param_dtype: Any = None
) -> PretrainedModel:
    """The model as `load_model` gives it, its arrays cut over the mesh as `place_model` cuts them; not prepared."""
    mesh = two_axes(mesh)

    def place(model: Transformer) -> dict[str, Any]:
        plan = plan_shards(model, mesh.shape)
        placed = {}
        for keys, variable in nnx.to_flat_state(nnx.state(model)):
            spec = plan.spec(keys, variable.get_value(), model.config)
            placed["/".join(map(str, keys))] = jax.tree.map(
                lambda leaf: NamedSharding(mesh, leaf), spec, is_leaf=lambda node: isinstance(node, PartitionSpec)
            )
        return placed

    return load_model(path, bits, param_dtype, place)

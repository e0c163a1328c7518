"""Models that are read from files, or drawn at random, straight into the devices of a mesh."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from bipolar_jax.models.checkpoint import load_model
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.prepare import Layout
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.models.sharding.plan import plan_shards
from bipolar_jax.models.sharding.sharded_transformer import ShardedTransformer, shard_model, two_axes
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.quantize import Precision


def load_sharded(
    path: str | os.PathLike[str],
    mesh: Mesh,
    dtype: Any = None,
    *,
    bits: int | None = None,
    param_dtype: Any = None,
    layout: Layout | None = None,
    cut_positions: bool = False,
    cut_tokens: bool = True,
) -> PretrainedModel:
    """`shard_model(load_model(path), mesh)`, where no host has more of the packed weights than its devices.

    A file that was written from any mesh, or from one device, loads on any other.

    Args:
      path: a file that `save_model` wrote.
      mesh, cut_positions, cut_tokens: see `shard_model`.
      dtype, layout: as for `prepare_for_inference`.
      bits, param_dtype: as for `load_model`.

    Raises: as `load_model` and `shard_model`.
    """
    loaded = load_placed(path, mesh, bits=bits, param_dtype=param_dtype)
    options = {"layout": layout, "cut_positions": cut_positions, "cut_tokens": cut_tokens}
    return shard_model(loaded, mesh, dtype, **options)


def load_placed(
    path: str | os.PathLike[str], mesh: Mesh, *, bits: int | None = None, param_dtype: Any = None
) -> PretrainedModel:
    """The model as `load_model` gives it, its arrays cut over the mesh as `place_model` cuts them; not prepared."""
    return load_model(path, bits, param_dtype, functools.partial(_shardings, two_axes(mesh)))


def random_sharded(
    config: TransformerConfig,
    precision: Precision,
    mesh: Mesh,
    *,
    key: PRNGKeyArray,
    layout: Layout | None = None,
    cut_positions: bool = False,
    cut_tokens: bool = True,
    **options: Any,
) -> ShardedTransformer:
    """`shard_model(random_packed(config, precision))`, the same bits, where no device has the whole model.

    Args:
      config, precision, key: as for `random_packed`.
      mesh, layout, cut_positions, cut_tokens: as for `shard_model`.
      **options: others of `random_packed`.

    Raises: as `random_packed` and `shard_model`.
    """
    place = functools.partial(_shardings, two_axes(mesh))
    model = random_packed(config, precision, key=key, place=place, **options)
    return shard_model(model, mesh, layout=layout, cut_positions=cut_positions, cut_tokens=cut_tokens)


def _shardings(mesh: Mesh, model: Transformer) -> dict[str, Any]:
    """The shardings of a model's arrays by path, as the plan of the mesh cuts them."""
    plan = plan_shards(model, mesh.shape)
    placed = {}
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        spec = plan.spec(keys, variable.get_value(), model.config)
        placed["/".join(map(str, keys))] = jax.tree.map(
            lambda leaf: NamedSharding(mesh, leaf), spec, is_leaf=lambda node: isinstance(node, PartitionSpec)
        )
    return placed

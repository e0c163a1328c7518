"""The mesh that a config asks for, and models on it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from bipolar_jax.models.inference.prepare import Layout, prepare_for_inference
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.sharding.plan import DATA, MODEL
from bipolar_jax.models.sharding.sharded_transformer import ShardedTransformer, shard_model
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Linear

from ..support.progress import console


def mesh_of(config: ConfigDict) -> Mesh | None:
    """The mesh of `config.mesh.data` x `config.mesh.model` devices; None for one device, and for a config without it.

    Raises:
      ValueError: sizes below 1, more devices than there are, or devices of some processes left over; `cut_positions`
        of one device.
    """
    if "mesh" not in config:
        return None
    sizes = int(config.mesh.data), int(config.mesh.model)
    asked, found, processes = sizes[0] * sizes[1], jax.device_count(), jax.process_count()
    what = f"config.mesh.data={sizes[0]} times config.mesh.model={sizes[1]}"
    if min(sizes) < 1:
        raise ValueError(f"{what}: both must be at least 1")
    if asked > found:
        raise ValueError(f"{what} is {asked} devices, and there are {found}: ask for fewer, or start more processes")
    if processes > 1 and asked != found:
        raise ValueError(
            f"{what} is {asked} devices, and {processes} processes have {found}: the mesh takes all of them"
        )
    if asked == 1:
        if cuts_of(config).get("cut_positions"):
            raise ValueError(f"{what} is one device, which has all positions: leave out config.mesh.cut_positions")
        return None
    return jax.make_mesh(sizes, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def cuts_of(config: ConfigDict) -> dict[str, bool]:
    """`cut_positions` and `cut_tokens` of `shard_model`, from config.mesh; those that the config has."""
    fields = config.mesh if "mesh" in config else {}
    return {name: bool(fields[name]) for name in ("cut_positions", "cut_tokens") if name in fields}


def on_mesh(
    pretrained: PretrainedModel | Transformer,
    mesh: Mesh | None,
    cuts: dict[str, bool],
    dtype: Any = None,
    layout: Layout | None = None,
) -> PretrainedModel | Transformer | ShardedTransformer:
    """A packed model, prepared for inference: cut over the mesh, whose plan is printed, or for one device.

    Args:
      pretrained: the model.
      mesh, cuts: `mesh_of` and `cuts_of` a config.
      dtype, layout: as for `prepare_for_inference`.

    Raises:
      ValueError: as `shard_model`; float models are not cut.
    """
    if mesh is None:
        return prepare_for_inference(pretrained, dtype, layout=layout)
    sharded = shard_model(pretrained, mesh, dtype, layout=layout, **cuts)
    plan = (sharded.model if isinstance(sharded, PretrainedModel) else sharded).plan
    console.print(str(plan), style="dim", highlight=False)
    return sharded


def packed_on_mesh(pretrained: PretrainedModel, mesh: Mesh | None, cuts: dict[str, bool]) -> PretrainedModel:
    """A model to be scored: cut over the mesh if it is packed. Raises ValueError as `shard_model`."""
    return on_mesh(pretrained, mesh, cuts) if mesh is not None and _is_packed(pretrained) else pretrained


def writer_on_mesh(
    pretrained: PretrainedModel, mesh: Mesh | None, cuts: dict[str, bool], texts: int
) -> PretrainedModel:
    """A model that is to write so many texts at once, prepared for inference.

    A packed one is cut over the mesh as by `on_mesh`. A float one is not cut: every device has the whole of it, and all
    devices, whatever their axis, divide the texts.

    Raises:
      ValueError: as `on_mesh`; texts that do not divide over the devices that share them.
    """
    if mesh is not None and not _is_packed(pretrained):
        mesh, cuts = Mesh(mesh.devices.reshape(-1, 1), mesh.axis_names, axis_types=mesh.axis_types), {}
    data = 1 if mesh is None else mesh.shape[DATA]
    if texts % data:
        raise ValueError(
            f"config.batch_size={texts} texts do not divide over {data} devices of config.mesh: use a multiple of "
            f"{data}, such as {-(-texts // data) * data}"
        )
    return on_mesh(pretrained, mesh, cuts)


def _is_packed(pretrained: PretrainedModel) -> bool:
    return any(isinstance(layer, Linear) for _, layer in nnx.iter_modules(pretrained.model))

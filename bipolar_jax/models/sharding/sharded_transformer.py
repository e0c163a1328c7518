"""A Transformer on the devices of a mesh: each runs a smaller model of its own, and sums are reduced twice a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.prepare import Layout, prepare_for_inference
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.sharding.plan import BLOCKS, DATA, MODEL, ShardingPlan, group_size_of_share, plan_shards
from bipolar_jax.models.sharding.shares import Share
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Linear, Packed, without_training
from bipolar_jax.packing import BipolarArray, BlockScaledArray
from bipolar_jax.packing.cuts import own_part, taken, taken_columns, taken_rows

_HEADS_AXIS = 2  # of a cache [layers, batch, kv_heads, capacity, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["graph", "mesh", "plan", "config"]
)
@dataclasses.dataclass(frozen=True)
class ShardedTransformer:
    """A model that `shard_model` has cut. `generate` and `stream` take it as they take a `Transformer`.

    Texts are divided over the mesh axis "data", heads and columns over "model". A layer reduces over "model" twice
    (int32 sums after o and after down), and before each of the two the smallest and the largest number of every token.
    Sums of long prompts are reduce-scattered over tokens, and codes gathered for q, k, v and for gate and up
    (`ShardingPlan.scatters`). Logits are those of one device: every integer is the same, float operations are the same
    operations.

    Attributes:
      state: the parameters of the devices' models, prepared; the first axis of each is that of devices along "model".
      graph: structure of one device's model.
      mesh: with the axes "data" and "model".
      plan: what is cut.
      config: of the whole model.
    """

    state: Any
    graph: nnx.GraphDef
    mesh: Mesh
    plan: ShardingPlan
    config: TransformerConfig

    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """As `Transformer.__call__`. Raises ValueError for texts that do not divide over "data"."""
        self._check_batch(ids)
        return _logits(self, ids)

    def hidden_states(
        self, ids: Int[Array, "batch length"], cache_bits: int | None = None
    ) -> Float[Array, "batch length hidden"]:
        """As `Transformer.hidden_states`. Raises ValueError for texts that do not divide over "data"."""
        self._check_batch(ids)
        text = PartitionSpec(DATA)
        return self.run(
            lambda part, ids: self.cut_tokens(part, ids).hidden_states(ids, cache_bits), text, ids, in_specs=[text]
        )

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """As `Transformer.logits`."""
        spec = self.logits_spec(*[None] * (hidden.ndim - 1))
        return self.run(
            lambda part, hidden: self.of_tokens(part.logits(hidden)), spec, hidden, in_specs=[PartitionSpec()]
        )

    def prefill(
        self,
        ids: Int[Array, "batch length"],
        lengths: Int[Array, " batch"],
        capacity: int,
        cache_bits: int | None = None,
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """As `Transformer.prefill`; the cache lies where the heads are, one copy for each device that shares a head.

        Raises:
          ValueError: as `Transformer.prefill`; texts that do not divide over "data".
        """
        self._check_batch(ids)
        return _prefill(self, ids, lengths, capacity, cache_bits)

    def decode(self, ids: Int[Array, " batch"], cache: KVCache) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """As `Transformer.decode`."""
        self._check_batch(ids)
        return _decode(self, ids, cache)

    def _check_batch(self, ids: Any) -> None:
        if len(ids) % self.plan.data:
            raise ValueError(
                f"{len(ids)} texts do not divide over {self.plan.data} devices of {DATA!r}: "
                "add texts, or make that axis of the mesh smaller"
            )

    def run(self, method: Callable, out_specs: Any, *operands: Any, in_specs: Sequence[Any]) -> Any:
        """method(model of one device, *operands) on every device; specs as for `jax.shard_map`."""

        def on_device(state, *operands):
            model = nnx.merge(self.graph, jax.tree.map(lambda leaf: leaf[0], state))
            return method(model, *operands)

        specs = (PartitionSpec(MODEL), *in_specs)
        # Replicated results are: they are made of reduced sums. JAX's check of that does not know Pallas kernels.
        program = jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # whatever mesh the caller has set
            return program(self.state, *operands)

    def cut_tokens(self, part: Transformer, ids: Int[Array, "batch length"]) -> Transformer:
        """A device's model, made to cut these prompts over "model" between products if the plan does so."""
        if self.plan.scatters(*ids.shape):
            part.token_axis = MODEL
            for _, stack in part.stacks:
                for block in BLOCKS:
                    for _, layer in nnx.iter_modules(getattr(stack, block)):
                        if isinstance(layer, Linear):
                            layer.token_axes = MODEL
        return part

    def trace(
        self, function: Callable[..., None], ids: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Any:
        """function(a device's model, its ids, its lengths, `cut_tokens` of these), for `explain_model`."""
        self._check_batch(ids)

        def on_device(part, ids, lengths):
            function(part, ids, lengths, lambda part: self.cut_tokens(part, ids))
            return lengths

        return self.run(on_device, PartitionSpec(DATA), ids, lengths, in_specs=[PartitionSpec(DATA)] * 2)

    def cache_specs(self, cache: KVCache) -> KVCache:
        """Specs of a cache: texts over "data", heads over "model" if attention is cut."""
        heads = MODEL if self.plan.attention else None

        def spec(leaf):
            return PartitionSpec(None, DATA, heads) if leaf.ndim > _HEADS_AXIS else PartitionSpec(DATA)

        return jax.tree.map(spec, cache)

    def logits_spec(self, *axes: str | None) -> PartitionSpec:
        """The spec of logits, whose last axis lies where the output layer's columns do, if the vocabulary divides."""
        return PartitionSpec(*axes, MODEL if self.plan.output and self.plan.vocabulary.is_even else None)

    def of_tokens(self, logits: Float[Array, "*batch part"]) -> Float[Array, "*batch vocab"]:
        """A device's logits; of a padded vocabulary those of all devices, without the padding's."""
        if not self.plan.output or self.plan.vocabulary.is_even:
            return logits
        whole = jax.lax.all_gather(logits, MODEL, axis=logits.ndim - 1, tiled=True)
        return whole[..., : self.config.vocab_size]


@jax.jit
def _logits(model: ShardedTransformer, ids: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
    spec = PartitionSpec(DATA)

    def logits(part, ids):
        return model.of_tokens(model.cut_tokens(part, ids)(ids))

    return model.run(logits, model.logits_spec(DATA, None), ids, in_specs=[spec])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _prefill(model: ShardedTransformer, ids, lengths, capacity: int, cache_bits: int | None):
    config = model.config
    heads = model.plan.model * model.plan.kv_heads.size if model.plan.attention else config.num_kv_heads
    shape = (config.num_layers, *ids.shape[:1], heads, capacity, config.head_dim)
    cache = jax.eval_shape(
        lambda lengths: KVCache.empty(
            shape, np.float32, cache_bits, lengths, config.key_rotation(cache_bits), model.plan.cut_positions(capacity)
        ),
        lengths,
    )

    def prefill(part, ids, lengths):
        logits, cache = model.cut_tokens(part, ids).prefill(ids, lengths, capacity, cache_bits)
        return model.of_tokens(logits), cache

    return model.run(
        prefill,
        (model.logits_spec(DATA), model.cache_specs(cache)),
        ids,
        lengths,
        in_specs=[PartitionSpec(DATA), PartitionSpec(DATA)],
    )


@jax.jit
def _decode(model: ShardedTransformer, ids, cache: KVCache):
    specs = model.cache_specs(cache)

    def decode(part, ids, cache):
        logits, cache = part.decode(ids, cache)
        return model.of_tokens(logits), cache

    return model.run(
        decode,
        (model.logits_spec(DATA), specs),
        ids,
        cache,
        in_specs=[PartitionSpec(DATA), specs],
    )


def shard_model(
    model: Transformer | PretrainedModel,
    mesh: Mesh,
    dtype: Any = None,
    *,
    layout: Layout | None = None,
    cut_positions: bool = False,
    cut_tokens: bool = True,
) -> ShardedTransformer | PretrainedModel:
    """The model cut over a mesh with the axes "data" and "model", or one of them, and prepared for inference.

    `plan.plan_shards` says what is cut; `print(sharded.plan)` what stays whole, and why. Arrays that are cut already
    (`place_model`) stay where they are.

    Args:
      model: packed, not joined, not prepared; scales of a GGUF file become float32 ones. Of several processes each
        gives the same arrays of the host (NumPy's), or arrays that are cut already.
      mesh: of any axis types.
      dtype, layout: as for `prepare_for_inference`, which prepares each device's part.
      cut_positions: whether devices that share a head of keys each cache a part of the positions, not all of them. A
        token then attends by XLA, and partial results are exchanged in every layer.
      cut_tokens: whether devices divide the tokens of long prompts between products (`ShardingPlan.scatters`).

    Raises:
      ValueError: a mesh with other axes; as `plan_shards` and `prepare_for_inference`.
    """
    if isinstance(model, PretrainedModel):
        options = {"layout": layout, "cut_positions": cut_positions, "cut_tokens": cut_tokens}
        return model.with_model(shard_model(model.model, mesh, dtype, **options))
    mesh = two_axes(mesh)
    model = _with_own_scales(without_training(model))
    plan = plan_shards(model, mesh.shape, cut_positions=cut_positions, cut_tokens=cut_tokens)
    graph, paths, arrays, specs = _cut(model, plan)
    graphs = []

    def on_device(arrays):
        part = _model_of_device(_merged(graph, paths, arrays), plan, model.config)
        graph_of_part, state = nnx.split(prepare_for_inference(part, dtype, layout=layout))
        graphs.append(graph_of_part)
        return jax.tree.map(lambda leaf: leaf[None], state)

    prepare = jax.shard_map(on_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(MODEL), check_vma=False)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.jit(prepare)(_placed(arrays, mesh, specs))
    return ShardedTransformer(state, graphs[-1], mesh, plan, model.config)


def place_model(model: Transformer, mesh: Mesh) -> Transformer:
    """The same model, its arrays cut over a mesh as `shard_model` will take them; `save_model` takes it, too.

    Raises:
      ValueError: as `shard_model`.
    """
    mesh, model = two_axes(mesh), _with_own_scales(model)
    graph, paths, arrays, specs = _cut(model, plan_shards(model, mesh.shape))
    return _merged(graph, paths, _placed(arrays, mesh, specs))


def two_axes(mesh: Mesh) -> Mesh:
    """The devices of a mesh as one with the Auto axes "data" and "model"; an axis that it lacks has one device.

    Raises:
      ValueError: no mesh, or one with other axes.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"the mesh must be a jax.sharding.Mesh, such as jax.make_mesh makes, got {mesh!r:.60}")
    if unknown := sorted(set(mesh.axis_names) - {DATA, MODEL}):
        raise ValueError(f"the mesh has the axis {unknown[0]!r}: models are cut over {DATA!r} and {MODEL!r} alone")
    devices = mesh.devices if mesh.axis_names != (MODEL, DATA) else mesh.devices.T
    sizes = [dict(mesh.shape).get(name, 1) for name in (DATA, MODEL)]
    return Mesh(devices.reshape(sizes), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def _with_own_scales(model: Transformer) -> Transformer:
    """A copy whose layers have float scales on the host instead of those of a GGUF file, whose blocks are not cut."""
    model = nnx.clone(model)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and isinstance(layer.kernel.get_value(), BlockScaledArray):
            layer.kernel = Packed(jax.tree.map(np.asarray, layer.kernel.get_value().with_scales()))
    return model


def _cut(model: Transformer, plan: ShardingPlan) -> tuple[nnx.GraphDef, list, list[Any], list[Any]]:
    """Structure, paths and variables, arrays, and specs of a model's parameters."""
    graph, state = nnx.split(model)
    variables = nnx.to_flat_state(state)
    arrays = [variable.get_value() for _, variable in variables]
    specs = [plan.spec(path, array, model.config) for (path, _), array in zip(variables, arrays, strict=True)]
    return graph, list(variables), arrays, specs


def _merged(graph: nnx.GraphDef, variables: list, arrays: Sequence[Any]) -> Transformer:
    flat = [(path, variable.replace(array)) for (path, variable), array in zip(variables, arrays, strict=True)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _placed(arrays: list[Any], mesh: Mesh, specs: list[Any]) -> list[Any]:
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.device_put(arrays, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec))


def _model_of_device(model: Transformer, plan: ShardingPlan, config: TransformerConfig) -> Transformer:
    """The model that a device runs, of the whole model's structure with that device's part of every array."""
    model.config = plan.config_of_device(config)
    model.cut_positions = plan.cut_positions(config.context_length)
    for run, stack in model.stacks:
        stack.attention.num_kv_heads = model.config.num_kv_heads
        if plan.has_idle_heads:
            used = _of_device(plan.queries.counts)
            stack.attention.used_heads = nnx.Variable(jnp.full((len(run),), used))
        if model.config.rotation is not None:
            stack.ffn.rotation = model.config.rotation.ffn
    columns, rows = plan.columns(config.head_dim), plan.rows(config.head_dim)
    for path, layer in nnx.iter_modules(model):
        name = path[-1] if path else None
        if name in rows:
            layer.in_features = rows[name].size
            layer.kernel = Packed(_own_rows(layer.kernel.get_value(), rows[name], plan, name))
            layer.k_axes = MODEL
        elif name in columns:
            _take_columns(layer, columns[name])
    return model


def _own_rows(w: BipolarArray, share: Share, plan: ShardingPlan, name: str) -> BipolarArray:
    """The device's rows of weights that it has whole, or of which it has its part already."""
    if share.is_even and name not in plan.realigned:
        return own_part(w, plan.model)
    start, count = _of_device(share.starts), _of_device(share.counts)
    return taken_rows(w, start, count, share.size, group_size_of_share(w, share))


def _take_columns(layer: nnx.Module, share: Share) -> None:
    """Leaves a layer the device's columns: all that it has of an array that is cut, else its share of a whole one."""
    layer.out_features = share.size
    if share.is_even:
        return
    start, count = _of_device(share.starts), _of_device(share.counts)
    kernel = layer.kernel.get_value()
    if isinstance(layer, Linear):
        layer.kernel = Packed(taken_columns(kernel, start, count, share.size))
    else:
        layer.kernel = nnx.Param(taken(kernel, -1, start, count, share.size))
    if layer.bias is not None:
        layer.bias = nnx.Param(taken(layer.bias[...], -1, start, count, share.size))


def _of_device(values: Sequence[int]) -> Int[Array, ""]:
    """The one of these numbers that is this device's."""
    return jnp.asarray(values, jnp.int32)[jax.lax.axis_index(MODEL)]

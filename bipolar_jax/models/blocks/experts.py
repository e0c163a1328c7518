"""The feed-forward block of a layer with experts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.models.blocks.feed_forward import GatedMLP
from bipolar_jax.models.blocks.norm import Norm, normalize
from bipolar_jax.models.blocks.step import Step, by_xla, post_norm_step, product_step
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.expert_config import Experts
from bipolar_jax.nn import Linear
from bipolar_jax.nn.layers.experts import (
    ExpertBlocks,
    block_shape,
    merges_columns,
    run_experts,
    run_side_by_side,
    side_by_side_layer,
)
from bipolar_jax.nn.layers.packed import CountedModule
from bipolar_jax.ops import Activation

_kernel_init = nnx.initializers.lecun_normal()


class Router(CountedModule):
    """Scores every expert of a layer for a token: x @ kernel, float32.

    No `nnx.Linear`, so that rules for linear layers leave it as it is: a score that is rounded chooses other experts.
    """

    stays_float = "a router: a rounded score would choose other experts"

    def __init__(self, config: TransformerConfig, experts: Experts, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (config.hidden_size, experts.count), param_dtype))

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens experts"]:
        kernel = self.kernel[...]
        return jnp.matmul(
            x.astype(kernel.dtype),
            kernel,
            precision=jax.lax.Precision.HIGHEST,  # a score is compared with others
            preferred_element_type=jnp.float32,
        )


class MixtureOfExperts(CountedModule):
    """x + sum over the chosen experts e of weight_e(x) * expert_e(norm(x)); arXiv 2401.04088, section 2.

    The weights are those of a softmax over the scores of all experts; `Experts.normalize` divides those of the chosen
    ones by their sum. The sum is one of float32, in the order of the weights.

    Attributes:
      router: makes the scores.
      experts: a stack of `GatedMLP`s, whose arrays have a leading axis of experts.
      first: where `experts` are those of several layers, see `without_experts`, the index of this layer's first one.
    """

    def __init__(self, config: TransformerConfig, experts: Experts, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_experts(expert_rngs):
            return GatedMLP(config, experts.ffn_size, param_dtype=param_dtype, rngs=expert_rngs)

        self.count, self.per_token, self.normalize = experts.count, experts.per_token, experts.normalize
        self.router = Router(config, experts, param_dtype=param_dtype, rngs=rngs)
        self.experts = make_experts(rngs.split(experts.count))
        self.first = nnx.data(None)

    def __call__(
        self, x: Float[Array, "batch length hidden"], norm: Norm, post_norm: Norm | None = None
    ) -> Float[Array, "batch length hidden"]:
        tokens = normalize(norm, x).reshape(-1, x.shape[-1])
        weights, chosen = self.choose(tokens)
        blocks = ExpertBlocks.of(chosen, weights, self.count)
        if self.first is not None:
            blocks = dataclasses.replace(blocks, experts=blocks.experts + self.first)
        experts, rows = self.experts, blocks.gather(tokens)
        if experts.gates_in_quantizer(rows[0]):
            out = run_experts(experts.down_proj, _inner(experts.gate_up_proj, rows, blocks), blocks, experts.gate)
        else:
            out = run_experts(experts.down_proj, self._gated(rows, blocks), blocks)
        added = blocks.scatter(out).astype(x.dtype).reshape(x.shape)
        return x + (added if post_norm is None else normalize(post_norm, added))

    def choose(
        self, tokens: Float[Array, "tokens hidden"]
    ) -> tuple[Float[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
        """The weights of the experts that run for each token, float32, the largest first; and their indices."""
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.router(tokens), axis=-1), self.per_token)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, chosen

    def _gated(self, rows: Float[Array, "blocks rows hidden"], blocks: ExpertBlocks) -> Float[Array, "blocks rows ffn"]:
        """function(gate(rows)) * up(rows)."""
        experts = self.experts
        if experts.is_joined and experts.gate is not None:
            return _inner(experts.gate_up_proj, rows, blocks, experts.gate)
        if experts.is_joined:
            gate, up = jnp.split(_inner(experts.gate_up_proj, rows, blocks), 2, axis=-1)
        else:
            gate, up = (_inner(layer, rows, blocks) for layer in (experts.gate_proj, experts.up_proj))
        return experts.function(gate) * up

    def explain(self, x: Float[Array, "batch length hidden"], norm: Norm, post_norm: Norm | None = None) -> list[Step]:
        """What `__call__` runs for these operands."""
        del norm
        tokens = x.size // x.shape[-1]
        num_blocks, size = block_shape(tokens, self.per_token, self.count)
        rows = jax.ShapeDtypeStruct((size, x.shape[-1]), x.dtype)
        experts = jax.tree.map(lambda leaf: leaf[0], self.experts)
        names = {"gate/up": "gate_up_proj"} if experts.is_joined else {"gate": "gate_proj", "up": "up_proj"}
        note = f"{self.per_token} of {self.count} experts a token: "
        loop = f"{note}one product after the other, {'' if tokens == 1 else 'up to '}{num_blocks} of {size} "
        loop += f"row{'s' if size > 1 else ''}, each copies and reads the weights of its expert"
        steps = [Step("router", by_xla("float32 dot, top-k, sort", "a router stays float"))]
        for name, path in (names | {"down": "down_proj"}).items():
            layer, why = getattr(experts, path), loop
            if tokens == 1 and name != "down" and merges_columns(layer):
                layer = side_by_side_layer(getattr(self.experts, path), jnp.zeros(self.per_token, jnp.int32))
                why = f"{note}their columns are copied side by side"
            steps.append(product_step(f"experts' {name}", layer, rows, why if isinstance(layer, Linear) else None))
        steps.append(Step("sum of experts", by_xla("elementwise kernels", "weighted by the router, float32")))
        return steps if post_norm is None else [*steps, post_norm_step("experts")]


def _inner(
    stack: nnx.Module,
    rows: Float[Array, "blocks rows hidden"],
    blocks: ExpertBlocks,
    activation: Activation | None = None,
) -> Float[Array, "blocks rows inner"]:
    """The product of tokens with gates or ups of their experts; one product for one token, where that is served."""
    if blocks.is_used is None and merges_columns(stack, activation):
        return run_side_by_side(stack, rows[0], blocks.experts, activation)
    return run_experts(stack, rows, blocks, activation=activation)


def without_experts(stack: nnx.Module) -> tuple[nnx.Module, GatedMLP | None]:
    """A stack of layers without their experts, and the experts of all layers in one axis; None where layers are dense.

    A scan that slices a stack copies all experts of a layer before it runs a few of them. One that closes over the
    experts reads the few, see `with_experts`; but a gradient of those would be as large as all layers, in every layer.
    """
    if not isinstance(stack.ffn, MixtureOfExperts):
        return stack, None
    experts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stack.ffn.experts)
    rest = nnx.clone(stack, variables=False)
    del rest.ffn.experts
    return rest, experts


def with_experts(layer: nnx.Module, experts: GatedMLP, index: Int[Array, ""]) -> nnx.Module:
    """A layer of the stack of `without_experts` with its experts, which are found by its index in the stack."""
    layer.ffn.experts = experts
    layer.ffn.first = nnx.data(index * layer.ffn.count)
    return layer

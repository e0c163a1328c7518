"""Any NNX model as a model of one block, whose layers are found by running it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array

from bipolar_jax.compress.packed_sites import SitePlan, is_dense, plan_sites, rules_for_others
from bipolar_jax.compress.site_inputs import Recorder, replace_layer
from bipolar_jax.nn.compressible import Sites, layer_at
from bipolar_jax.nn.convert.layer_paths import layer_references
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.rules import Rules
from bipolar_jax.quantize import Precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A module as a `nn.compressible.Compressible` of one block; what enters it are the arguments of its call.

    Attributes:
      module: the module.
      block_sites: its dense layers in the order in which they run; those that are given the same array share an input.
    """

    module: nnx.Module
    block_sites: tuple[Sites, ...] = dataclasses.field(metadata={"static": True})
    num_blocks: ClassVar[int] = 1

    @classmethod
    def of(cls, module: nnx.Module, arguments: tuple[Any, ...]) -> WholeModel:
        """Finds the layers that a call with these arguments runs. Stacks, and layers with two paths, are left out."""
        references = layer_references(module, (nnx.Linear, nnx.LinearGeneral))
        paths = Counter(id(reference.layer) for reference in references)
        dense = [each.path for each in references if paths[id(each.layer)] == 1 and is_dense(each.layer)]
        inputs: list[tuple[Array, list[str]]] = []

        def run(module, arguments):
            module = nnx.clone(module)
            for path in dense:
                replace_layer(module, path, Recorder(layer_at(module, path), recorder(path)))
            return module(*arguments)

        def recorder(path: str) -> Callable[[Array], None]:
            def record(x):
                same = next((names for each, names in inputs if each is x), None)
                if any(path in names for _, names in inputs):
                    return
                if same is None:
                    inputs.append((x, [path]))
                else:
                    same.append(path)

            return record

        jax.eval_shape(run, module, arguments)
        return cls(module, tuple(Sites(tuple(names), to_stream=False) for _, names in inputs))

    def plan(self, rules: Rules) -> tuple[tuple[SitePlan, ...], list[tuple[str, Precision]]]:
        """As `plan_blocks`."""
        packed = jax.eval_shape(lambda module: quantize_model(module, rules), self.module)
        module = nnx.clone(
            self.module
        )  # as `quantize_model` has it: which path of a tied layer is the first may differ
        return plan_sites(self.block_sites, module, packed), rules_for_others(module, rules, self.block_sites)

    def block(self, index: int) -> nnx.Module:
        """The module."""
        del index
        return self.module

    def with_blocks(self, blocks: Sequence[nnx.Module]) -> WholeModel:
        """This module in place of the other."""
        (module,) = blocks
        return dataclasses.replace(self, module=module)

    def enter_blocks(self, ids: Any) -> Any:
        """The arguments."""
        return ids

    def run_block(self, block: nnx.Module, carry: Any) -> Any:
        """What the module returns."""
        return block(*carry)

    def stream(self, carry: Any) -> Any:
        """What the module returns: no site adds to a stream."""
        return carry

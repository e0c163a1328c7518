"""Any NNX model as a model of one block, whose layers are found by running it."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array

from bipolar_jax.compress.packed_sites import SitePlan, is_dense, plan_sites, rules_for_others
from bipolar_jax.compress.site_inputs import Recorder, replace_layer
from bipolar_jax.nn.compressible import Sites, layer_at
from bipolar_jax.nn.convert.layer_paths import layer_references
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.rules import Rules
from bipolar_jax.quantize import Precision

_MOST_SHOWN = 5  # layers in a warning


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A module as a `nn.compressible.Compressible` of one block; what enters it are the arguments of its call.

    Attributes:
      module: the module.
      block_sites: its dense layers in the order in which they run; those that are given the same array share an input.
      hidden: paths of those that it runs in a trace of its own, such as `nnx.remat`, out of which inputs cannot come.
    """

    module: nnx.Module
    block_sites: tuple[Sites, ...] = dataclasses.field(metadata={"static": True})
    hidden: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    num_blocks: ClassVar[int] = 1

    @classmethod
    def of(cls, module: nnx.Module, arguments: tuple[Any, ...]) -> WholeModel:
        """Finds the layers that a call with these arguments runs. Stacks, and layers with two paths, are left out."""
        references = layer_references(module, (nnx.Linear, nnx.LinearGeneral))
        paths = Counter(id(reference.layer) for reference in references)
        dense = [each.path for each in references if paths[id(each.layer)] == 1 and is_dense(each.layer)]
        inputs: list[tuple[Array, list[str]]] = []
        hidden: dict[str, None] = {}

        def run(module, arguments):
            module, outside = nnx.clone(module), get_opaque_trace_state(convention="nnx")
            for path in dense:
                replace_layer(module, path, Recorder(layer_at(module, path), recorder(path, outside), zeros=True))
            return module(*arguments)

        def recorder(path: str, outside: Any) -> Callable[[Array], None]:
            def record(x):
                if get_opaque_trace_state(convention="nnx") != outside:
                    hidden.setdefault(path)
                    return
                same = next((names for each, names in inputs if each is x), None)
                if any(path in names for _, names in inputs):
                    return
                if same is None:
                    inputs.append((x, [path]))
                else:
                    same.append(path)

            return record

        jax.eval_shape(run, module, arguments)
        seen = [[name for name in names if name not in hidden] for _, names in inputs]
        return cls(module, tuple(Sites(tuple(names), to_stream=False) for names in seen if names), tuple(hidden))

    def plan(self, rules: Rules) -> tuple[tuple[SitePlan, ...], list[tuple[str, Precision]]]:
        """As `plan_blocks`. Warns of layers that are rounded without data because they are hidden."""
        packed = jax.eval_shape(lambda module: quantize_model(module, rules), self.module)
        module = nnx.clone(
            self.module
        )  # as `quantize_model` has it: which path of a tied layer is the first may differ
        others = rules_for_others(module, rules, self.block_sites)
        patterns = {pattern for pattern, _ in others}
        if hidden := [path for path in self.hidden if f"^{re.escape(path)}$" in patterns]:
            more = " and others" if len(hidden) > _MOST_SHOWN else ""
            warnings.warn(
                f"{', '.join(hidden[:_MOST_SHOWN])}{more}: rounded without data, because the model runs them within "
                "nnx.jit, remat, scan or vmap, where their inputs cannot be read; calibrate the model without these",
                stacklevel=3,
            )
        return plan_sites(self.block_sites, module, packed), others

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

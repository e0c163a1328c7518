"""Whole operations of one shape and precision: operands, the call as users make it, other plans, and the exact product.

Operands are made by one compiled program a case, so that hundreds of shapes cost no compilations of small programs.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bipolar_jax as bj
from bipolar_jax import BipolarArray, Precision
from bipolar_jax.format import as_format
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.semantics.activations import QuantizedTokens, quantize_tokens
from bipolar_jax.kernels.sm90.backend import float_products, planning
from bipolar_jax.kernels.sm90.backend.expanded_planning import chunks_of, expanded_times, plan_expanded
from bipolar_jax.kernels.sm90.backend.operations import choose_kernel, tokens_matmul
from bipolar_jax.kernels.sm90.backend.planning import Choice
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import tokens_product
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling, decode_tilings
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import with_slots
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.inference.prepare import belongs_on_tensor_cores
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.words import unpack_codes
from bipolar_jax.quantize.groups import group_lengths
from bipolar_jax.quantize.integer_groups import IntegerGroups
from experiments.bench.products.operands import Operands, check_output
from experiments.bench.products.shapes import Shape

Layout = Literal["models", "planes", "tensor_cores"]
Operation = Callable[[Array, Any], Array]  # of activations and weights

_MOST_OTHER_PAIRS = 16  # planes up to which the other kind of operands is tried
# Of packed weights, tried beside the planner's candidates: consumers that share a tile load less where tokens are few.
_FURTHER_TILINGS = (
    Tiling(128, 128, "split_n", slots=4),
    Tiling(64, 128, "split_n", slots=5),
)


class OtherPlan(NamedTuple):
    """A plan of a product that may not be the chosen one.

    Attributes:
      kind: operands of the kernel, "planes" or "int8"; None of float activations.
      tiling: of the kernel.
      operation: the whole operation.
    """

    kind: str | None
    tiling: Any
    operation: Operation

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tiling": dataclasses.asdict(self.tiling)}


def layout_of(w: BipolarArray | PreparedArray) -> Layout:
    """The layout of weights."""
    return "tensor_cores" if isinstance(w, PreparedArray) else "planes"


class Sample(NamedTuple):
    """What the exact product of the sampled rows and columns takes.

    Attributes:
      x: the sampled rows, or None if they are quantized.
      tokens: the same, quantized, or None.
      codes: of the sampled columns of the weights, uint8 [columns, k].
      scale: of these columns, float32 [columns, groups or 1].
      groups: their integer groups, or None.
    """

    x: Float[Array, "rows k"] | None
    tokens: QuantizedTokens | None
    codes: Array
    scale: Array
    groups: IntegerGroups | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
      shape: sizes.
      precision: of weights and activations.
      implementation: backend of the call, "auto" as users have it.
      layout: of the weights: "models" as `prepare_for_inference` lays them out for a Hopper GPU, "planes", or
        "tensor_cores".
      seed: of the operands and the sample.
    """

    shape: Shape
    precision: Precision
    implementation: str = "auto"
    layout: Layout = "models"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.precision}"

    @functools.cached_property
    def weights(self) -> BipolarArray | PreparedArray:
        """The weights as shapes."""
        return jax.eval_shape(self.make, jax.random.key(0))[0][1]

    def make(self, key: Array) -> tuple[tuple[Array, Any], Sample]:
        """Activations and weights of a key, and the sample. To be compiled; other keys give other copies."""
        operands, precision = Operands(self.shape, self.seed, key), self.precision
        w_format, a_format, k = as_format(precision.w_bits), precision.a_format, self.shape.k
        packed = operands.weights(w_format, precision.group_size, precision.scales == "integer")
        x = operands.x[operands.rows]
        columns = jnp.asarray(operands.columns)
        groups = packed.groups
        sample = Sample(
            x.astype(jnp.float32) if a_format is None else None,
            None if a_format is None else quantize_tokens(x, a_format),
            unpack_codes(packed.planes[:, columns], w_format, k),
            packed.scale[columns],
            None if groups is None else jax.tree.map(lambda term: term[columns], groups),
        )
        return (operands.x, packed.prepare(for_floats=a_format is None) if self._is_prepared else packed), sample

    @property
    def _is_prepared(self) -> bool:
        if self.layout != "models":
            return self.layout == "tensor_cores"
        bits, has_groups = as_format(self.precision.w_bits).bits, self.precision.group_size is not None
        return belongs_on_tensor_cores(bits, self.precision.a_bits, has_groups=has_groups)

    def operation(self, x: Array, w: Any) -> Array:
        """`bj.matmul`, from bf16 activations to bf16."""
        return bj.matmul(x, w, a_bits=self.precision.a_format, implementation=self.implementation)

    def pick(self, product: Array) -> Array:
        """The sampled numbers of a product [m, n]: [rows, columns]."""
        operands = Operands(self.shape, self.seed)
        return product[operands.rows][:, operands.columns]

    def check(self, picked: Array, sample: Sample) -> float:
        """The largest error of sampled numbers. Raises ValueError unless they are exact but for rounding."""
        w_format, a_format = as_format(self.precision.w_bits), self.precision.a_format
        codes = np.asarray(sample.codes, np.float64)
        if sample.groups is None:
            w = 2 * codes - w_format.max_value
        else:
            lengths = group_lengths(self.shape.k, self.precision.group_size)
            scale, offset = (
                np.repeat(np.asarray(term, np.float64), lengths, axis=1)
                for term in (sample.groups.scale, sample.groups.offset)
            )
            w = scale * codes + offset
        of_scale = None if sample.groups is not None else self.precision.group_size
        w *= np.repeat(np.asarray(sample.scale, np.float64), group_lengths(self.shape.k, of_scale), axis=1)
        if a_format is None:
            x = np.asarray(sample.x, np.float64)
            tolerance = 2.0**-19 * (np.abs(x) @ np.abs(w).T)
        else:
            scale = np.asarray(sample.tokens.scale, np.float64)[:, None]
            values = np.asarray(a_format.values(sample.tokens.codes), np.float64)
            x = (values - np.asarray(sample.tokens.zero_value, np.float64)[:, None]) * scale
            # An activation halfway between two codes may get either; they differ by 2 * scale. Two a row are allowed.
            tolerance = 4 * scale * np.abs(w).max(axis=1)
        found = np.asarray(picked)
        return check_output(found, found, x @ w.T, tolerance)

    # Plans.

    @property
    def plan(self) -> planning.Choice | Any:
        """The chosen tiling and why. Raises Unsupported where the Hopper kernels refuse."""
        m, w, a_format = self.shape.m, self.weights, self.precision.a_format
        if a_format is None:
            return float_products.plan_matmul(m, jnp.bfloat16, w)
        if isinstance(w, PreparedArray):
            return plan_expanded(m, w, jnp.bfloat16)
        return choose_kernel(m, w, a_format, may_split=True)

    def others(self, most: int) -> dict[str, OtherPlan]:
        """At most so many other plans of the same product: the best by estimate, and one that differs by shape."""
        try:
            chosen = self.plan
        except Unsupported:
            return {}
        m, w, a_format = self.shape.m, self.weights, self.precision.a_format
        if a_format is None:
            plans = self._float_plans()
        elif isinstance(w, PreparedArray):
            plans = self._few_prepared_plans() if m <= FEW_TOKENS_LIMIT else {}
            if m > FEW_TOKENS_LIMIT // 4:  # between, either kernel may be quicker
                plans = self._many_prepared_plans() | plans
        else:
            plans = self._packed_plans()
        of_chosen = getattr(chosen, "kind", None), chosen.tiling
        names = [name for name, plan in plans.items() if (plan.kind, plan.tiling) != of_chosen]
        if len(names) > most > 0:
            rest = names[most - 1 :]
            names = [*names[: most - 1], rest[zlib.crc32(self.name.encode()) % len(rest)]]
        return {name: plans[name] for name in names[:most]}

    def _packed_plans(self) -> dict[str, OtherPlan]:
        """Of bit planes: tilings of the kind that is chosen, then of the other."""
        (m, n, k), w, a_format = (self.shape.m, self.shape.n, self.shape.k), self.weights, self.precision.a_format
        chosen, pairs = self.plan, w.bits * a_format.bits
        kinds = [chosen.kind]
        if w.num_groups == 1 and 2 < pairs <= _MOST_OTHER_PAIRS:
            kinds.append("int8" if chosen.kind == "planes" else "planes")
        choices = []
        for number, kind in enumerate(kinds):
            if w.num_groups == 1:
                candidates = planning.CANDIDATES + _FURTHER_TILINGS
                times = planning.tiling_times(m, n, k, kind, pairs, candidates=candidates)
            else:
                steps = planning.mainloop_steps(k, kind, pairs)
                candidates = planning.GROUPED_CANDIDATES
                times = {tiling: planning.estimated_cycles(tiling, m, n, steps) for tiling in candidates}
            tilings = sorted(times, key=times.get)
            choices += [Choice(kind, tiling, "") for tiling in (tilings if number == 0 else tilings[:1])]
        if isinstance(chosen.tiling, DecodeTiling) and w.num_groups == 1 and chosen.tiling.parts == 1:
            tilings = decode_tilings(m, k, a_format.bits, w.bits)
            choices = [Choice("planes", tiling, "") for tiling in tilings] + choices[:1]

        def operation(choice: Choice) -> Operation:
            def product(x, w):
                tokens = quantize_and_pack(x, a_format, choice.kind, interpret=interpret_params())
                return tokens_matmul(tokens, w, a_format, None, choice, x.dtype)

            return product

        return {
            f"{choice.kind} {_shown(choice.tiling)}": OtherPlan(choice.kind, choice.tiling, operation(choice))
            for choice in choices
        }

    def _many_prepared_plans(self) -> dict[str, OtherPlan]:
        times = expanded_times(self.shape.m, self.weights, jnp.dtype(jnp.bfloat16))
        return {
            _shown(tiling): OtherPlan("int8", tiling, self._tokens_product(tokens_product, tiling))
            for tiling in sorted(times, key=times.get)
        }

    def _few_prepared_plans(self) -> dict[str, OtherPlan]:
        m, w = self.shape.m, self.weights
        tilings = [
            with_slots(FewTokensTiling(warpgroups, parts, depth, cluster=cluster), m, w.bits, chunks_of(w))
            for depth in (2, 1)
            for warpgroups in (3, 2, 4)
            for cluster, parts in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 4), (1, 7))
            if warpgroups < 4 or m <= 16  # more accumulators need more registers
        ]
        return {
            _shown(tiling): OtherPlan("int8", tiling, self._tokens_product(few_tokens_product, tiling))
            for tiling in tilings
            if tiling.slots >= 2
        }

    def _tokens_product(self, multiply: Callable[..., Array], tiling: Any) -> Operation:
        a_format = self.precision.a_format

        def product(x, w):
            tokens = quantize_and_pack(x, a_format, "int8", interpret=interpret_params())
            return multiply(tokens, w, a_format, None, x.dtype, tiling=tiling, interpret=interpret_params())

        return product

    def _float_plans(self) -> dict[str, OtherPlan]:
        """Other tiles; of few tokens the best."""
        m, w = self.shape.m, self.weights
        if not isinstance(w, PreparedArray):
            return {}
        times: dict[Any, float] = float_products.tiling_times(m, w)
        tilings = sorted(times, key=times.get)
        if m <= FEW_TOKENS_LIMIT:
            tilings = tilings[:1]
        return {
            _shown(tiling): OtherPlan(
                None,
                tiling,
                lambda x, w, tiling=tiling: float_products.weight_only_matmul(x, w, None, tiling=tiling),
            )
            for tiling in tilings
        }


def _shown(tiling: Any) -> str:
    """A tiling in a few words."""
    if isinstance(tiling, DecodeTiling):
        return f"rows, {tiling.warpgroups} warpgroups, {tiling.w_slots} and {tiling.x_slots} slots"
    if isinstance(tiling, FewTokensTiling):
        return (
            f"{tiling.warpgroups} warpgroups, {tiling.parts} parts, depth {tiling.depth}, {tiling.slots} slots, "
            f"clusters of {tiling.cluster}"
        )
    splits = f", {tiling.splits} splits" if tiling.splits > 1 else ""
    cluster = f", clusters of {tiling.cluster_m}x{tiling.cluster_n}" if tiling.cluster_size > 1 else ""
    return f"{tiling.tile_m}x{tiling.tile_n} {tiling.schedule}, {tiling.slots} slots{splits}{cluster}"

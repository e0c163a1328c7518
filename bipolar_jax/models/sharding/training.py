"""How a Transformer in training is cut over a mesh: which axis of each float parameter is divided.

XLA partitions a jitted step by these shardings; products partition themselves (`ops.partitioned`). Tokens are divided
over "data", heads and widths over "model"; the optimizer's moments over both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from flax import nnx
from jax.sharding import PartitionSpec

from bipolar_jax.models.sharding.plan import DATA, MODEL
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.packing.words import WORD_BITS


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Which layers are cut over `MODEL`. Embeddings, norms and all that is not named are whole on every device.

    Attributes:
      data, model: devices along each axis.
      columns: names of layers whose output axis is cut: kernel, bias and learned step sizes.
      rows: names of layers whose contracted axis is cut.
      whole: a sentence for each block that is whole, with the reason.
    """

    data: int
    model: int
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    whole: tuple[str, ...]

    def spec(self, name: str, ndim: int) -> PartitionSpec:
        """The spec of a parameter.

        Args:
          name: its path, such as "layers/attention/o_proj/kernel" or ".../q_proj/dot_general/step_size".
          ndim: its axes, those of stacked layers included.
        """
        *path, last = name.split("/")
        layers = set(path)
        axes: list[str | None] = [None] * ndim
        if layers & set(self.columns):
            # Step sizes are [*layers, n, numbers], kernels [*layers, k, n], biases [*layers, n].
            axes[-2 if last == "step_size" else -1] = MODEL
        elif layers & set(self.rows) and last == "kernel":
            axes[-2] = MODEL
        return PartitionSpec(*axes)

    def moment_spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of what an optimizer keeps of a parameter: cut as that is, and over `DATA` where an axis divides.

        Each device then updates its part of a parameter, which XLA gathers (ZeRO stage 1, arXiv 1910.02054).
        """
        axes = [*self.spec(name, len(shape))]
        free = [axis for axis, names in enumerate(axes) if names is None and shape[axis] % self.data == 0]
        if self.data > 1 and free:
            axes[max(free, key=lambda axis: shape[axis])] = DATA
        return PartitionSpec(*axes)

    def __str__(self) -> str:
        cut = ", ".join((*self.columns, *self.rows)) or "nothing"
        first = f"{self.data} x {self.model} devices ({DATA}, {MODEL}); cut over {MODEL}: {cut}"
        return "\n".join([first, *(f"  {sentence}" for sentence in self.whole)])


def plan_training(stages: Sequence[Transformer], sizes: Mapping[str, int]) -> TrainingPlan:
    """The plan of a model with float parameters for a mesh of these sizes.

    Attention is cut if the heads of queries and those of keys divide; feed-forward blocks if their width does; the
    output layer if it has weights of its own and the vocabulary divides. Rows of layers that train at low precision are
    cut at ends of words and groups.

    Args:
      stages: the model as `quantization_aware` gives it, or float, at each precision that it will have in training;
        arrays or their shapes and dtypes. What one of them leaves whole is whole in all.
      sizes: devices by axis of the mesh.

    Raises:
      ValueError: several devices along `MODEL`, and neither attention nor feed-forward blocks can be cut.
    """
    data, parts = sizes.get(DATA, 1), sizes.get(MODEL, 1)
    if parts == 1:
        return TrainingPlan(data, 1, (), (), ())
    config = stages[0].config
    # XLA would give devices that share a head a part of an axis of the mesh, which `custom_partitioning` cannot name.
    attention = _does_not_divide(config.num_kv_heads, parts, "heads of keys and values")
    attention = (
        _does_not_divide(config.num_heads, parts, "heads") or attention or _rows_problem(stages, "o_proj", parts)
    )
    ffn = _does_not_divide(config.ffn_size, parts, "columns") or _rows_problem(stages, "down_proj", parts)
    ffn = ffn if config.experts is None else "its experts are not cut"
    output = "it is the embedding" if config.tie_embeddings else _does_not_divide(config.vocab_size, parts, "tokens")
    named = (("attention", attention), ("feed-forward blocks", ffn), ("output layer", output))
    whole = [f"{name} whole on every device: {problem}" for name, problem in named if problem]
    if attention and ffn:
        raise ValueError(f"the model cannot be cut over {parts} devices: {'; '.join(whole[:2])}")
    columns = [] if attention else ["q_proj", "k_proj", "v_proj"]
    columns += [] if ffn else ["gate_proj", "up_proj"]
    columns += [] if output else ["lm_head"]
    rows = [*([] if attention else ["o_proj"]), *([] if ffn else ["down_proj"])]
    return TrainingPlan(data, parts, tuple(columns), tuple(rows), tuple(whole))


def _does_not_divide(count: int, parts: int, what: str) -> str | None:
    return f"{count} {what} do not divide over {parts} devices" if count % parts else None


def _rows_problem(stages: Sequence[Transformer], name: str, parts: int) -> str | None:
    """Why the rows of the layers of a name cannot be cut; None if they can."""
    found = [module for model in stages for module in nnx.iter_modules(model)]
    for layer in (layer for path, layer in found if path and path[-1] == name):
        k, unit = layer.kernel.shape[-2], _unit_of_rows(layer)
        if k % (parts * unit):
            return f"k={k} of {name} cannot be cut into {parts} parts of a multiple of {unit} (words and groups)"
    return None


def _unit_of_rows(layer: nnx.Module) -> int:
    """Rows that stay together: whole words and groups of a layer that trains at low precision, else one."""
    dot_general = getattr(layer, "dot_general", None)
    dot_general = getattr(dot_general, "dot_general", dot_general)  # learned step sizes wrap it
    precision = getattr(dot_general, "precision", None)
    return 1 if precision is None else math.lcm(WORD_BITS, precision.group_size or 1)

"""What is asked of a reconstruction."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

from bipolar_jax.format import as_format
from bipolar_jax.quantize import Precision

Target = Literal["float_model", "float_block"]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How the weights of a block learn together, after they were rounded layer by layer.

    Attributes:
      epochs: how often it sees all windows.
      windows_per_update: windows of one update; calibration then runs so many at once.
      code_rate: the peak learning rate of weights, in steps of their grid: Adam moves a weight by about as much.
      grid_rate: that of scales and offsets, in parts of a step.
      target: what a block learns to put out: the stream that the float model has after it ("float_model"), or what the
        float block makes of the packed model's stream ("float_block").
      learn_groups: whether the integers of integer groups learn, too, or the scale of each row alone.

    Raises:
      ValueError: numbers that are not positive, or another target.
    """

    epochs: int = 8
    windows_per_update: int = 4
    code_rate: float = 1e-2
    grid_rate: float = 2e-3
    target: Target = "float_block"
    learn_groups: bool = True

    def __post_init__(self):
        for name in ("epochs", "windows_per_update"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        for name in ("code_rate", "grid_rate"):
            rate = getattr(self, name)
            if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {rate!r}")
        if self.target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {self.target!r}")
        if not isinstance(self.learn_groups, bool):
            raise ValueError(f"learn_groups must be True or False, got {self.learn_groups!r}")

    @classmethod
    def of(cls, precision: Precision) -> Reconstruction | None:
        """What suits a precision: these defaults for weights of up to 3 or activations of up to 4 bits, else None.

        It lowers the perplexity of SmolLM2-135M by 38% at W2A8g64, 4% at W3A8g64 and 10% at W4A4g64; also by 3% at
        W4A8 and 2% at W4A8g64, which do without it by default: it takes a minute on a GPU, and on CPUs was not timed.
        """
        few = as_format(precision.w_bits).bits <= 3 or (precision.a_bits is not None and precision.a_bits <= 4)
        return cls() if few else None

    def updates(self, batches: int) -> list[tuple[int, float]]:
        """The batch of every update, and what its rates are multiplied by.

        A first pass over all batches moves nothing: it measures the loss, and Adam's means begin with gradients of all
        batches. Then every epoch has all batches, in an order drawn from a fixed seed, at rates that fall to 0 as a
        cosine.
        """
        rng, length = np.random.default_rng(0), self.epochs * batches
        order = np.concatenate([rng.permutation(batches) for _ in range(self.epochs)])
        decay = 0.5 * (1 + np.cos(np.pi * np.arange(length) / length))
        return [*((batch, 0.0) for batch in range(batches)), *zip(order.tolist(), decay.tolist(), strict=True)]

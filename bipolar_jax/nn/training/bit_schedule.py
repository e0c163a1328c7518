"""Schedules of the precision during training."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

from bipolar_jax.quantize import Precision


@dataclasses.dataclass(frozen=True)
class BitSchedule:
    """Precisions by training step; each is used from its first step up to that of the next.

    A model of few bits trains better if it starts from one trained at more bits (Zhuang et al.
    2018, arXiv 1711.00205, section 3.2; for transformers of one bit BiT, arXiv 2205.13016,
    section 3.2):

        schedule = BitSchedule([(0, None), (1000, Precision(4, 8)), (2000, Precision(1, 2))])
        for step in range(3000):
            if step in schedule.changes:
                model = bj.quantization_aware(model, [("blocks", schedule.at(step))])

    A change of bits compiles the training step again. The optimizer's state remains valid,
    because the parameters stay the same.

    Attributes:
      stages: (first step, precision) pairs, the first at step 0; None is float.

    Raises:
      ValueError: no stages, a first stage that is not at step 0, steps that do not increase,
        or a stage without a `Precision` or None.
    """

    stages: Sequence[tuple[int, Precision | None]]

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple((step, precision) for step, precision in self.stages))
        steps = self.changes
        if not steps or steps[0] != 0 or any(late <= early for early, late in itertools.pairwise(steps)):
            raise ValueError(f"stages must begin at step 0 and have increasing steps, got steps {list(steps)}")
        for step, precision in self.stages:
            if precision is not None and not isinstance(precision, Precision):
                raise ValueError(f"the stage at step {step} has {precision!r}: give a Precision, or None for float")

    @property
    def changes(self) -> tuple[int, ...]:
        """The first step of every stage."""
        return tuple(step for step, _ in self.stages)

    def at(self, step: int) -> Precision | None:
        """The precision at a step. Raises ValueError if the step is negative."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return self.stages[bisect.bisect_right(self.changes, step) - 1][1]

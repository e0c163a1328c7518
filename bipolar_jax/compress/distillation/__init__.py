"""Distillation after rounding: a packed model learns from its float self, starting from what calibration found.

student = Student(learning_model(packed, floats))
state, step, schedule = DistillationState.of(student.params), Step(student, teacher), Schedule.of(precision)
for done, windows in enumerate(batches):
    state, metrics = step(state, windows, schedule, done)
packed = packed_again(student.model(state.params), packed)
"""

from bipolar_jax.compress.distillation.distill import DistillationState, Schedule, Step, window_loss
from bipolar_jax.compress.distillation.learning_model import Student, learning_model, packed_again

__all__ = [
    "DistillationState",
    "Schedule",
    "Step",
    "Student",
    "learning_model",
    "packed_again",
    "window_loss",
]

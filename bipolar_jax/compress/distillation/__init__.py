"""Distillation after rounding: a packed model learns from its float self, starting from what calibration found.

student = Student(learning_model(packed, floats))
state = DistillationState.initial(student, schedule)
step = make_step(student, teacher, schedule)
state, metrics = step(state, windows)
packed = packed_again(student.model(state.params), packed)
"""

from bipolar_jax.compress.distillation.distill import DistillationState, Schedule, make_step, window_loss
from bipolar_jax.compress.distillation.learning_model import Student, learning_model, packed_again

__all__ = [
    "DistillationState",
    "Schedule",
    "Student",
    "learning_model",
    "make_step",
    "packed_again",
    "window_loss",
]

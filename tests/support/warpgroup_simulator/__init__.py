"""The instructions of `kernels.sm90.core.ptx` for the 128 threads of a warpgroup at once, in numpy.

All threads execute in lockstep: barriers do nothing, and races are not seen (interpret mode finds those). Each module
has the twins of the module of `ptx` that has its name.
"""

from __future__ import annotations

import inspect

from bipolar_jax.kernels.sm90.core import ptx
from tests.support.warpgroup_simulator import control, floats, integers, memory, types
from tests.support.warpgroup_simulator.memory import bank_conflicts
from tests.support.warpgroup_simulator.types import THREADS, WARP, float32, int32

__all__ = ["THREADS", "WARP", "bank_conflicts", "float32", "install", "int32"]

_TWINS = {module.__name__.rpartition(".")[2]: module for module in (control, floats, integers, memory, types)}


def install(monkeypatch) -> None:
    """Replaces every public function of `ptx` by its twin."""
    for name, function in vars(ptx).items():
        own = inspect.isfunction(function) and function.__module__.startswith(ptx.__name__)
        if own and not name.startswith("_") and not name.endswith("_type"):
            topic = function.__module__.rpartition(".")[2]
            monkeypatch.setattr(ptx, name, getattr(_TWINS[topic], name))

"""Several processes that run one program on one mesh: joining, values that all share, and how each of them ends.

Process 0 has the coordinator, which every process sends heartbeats to. Of a process that dies its peers learn by a
failed exchange at once, or by missing heartbeats within `HEARTBEAT_SECONDS`; then JAX ends them without a chance for
Python to speak, which is why each runs below a launcher of its own (`launcher.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# After so long without a heartbeat a process counts as dead, and JAX ends the others.
HEARTBEAT_SECONDS = 30
# How long processes wait for the last one at the end, in which process 0 may pack and write a model.
_SHUTDOWN_SECONDS = 3600
# In the messages of XLA's collectives on CPUs and GPUs, and of its coordination service.
_LOST = re.compile(r"Gloo|NCCL|coordination service|CoordinationService|[Hh]eartbeat")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among several.

    Attributes:
      coordinator: address of process 0 that all others reach, "host:port" with a free port.
      count: number of processes.
      index: of this one, from 0.

    Raises:
      ValueError: numbers that contradict each other, or no port.
    """

    coordinator: str
    count: int
    index: int

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal()):
            raise ValueError(f"--coordinator={self.coordinator} has no host and port: give one such as 10.0.0.1:1234")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"--process={self.index} of --processes={self.count}: processes are numbered from 0 to {self.count - 1}"
            )

    def join(self) -> None:
        """Waits for all processes, up to five minutes; only the first one prints from here on."""
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        jax.distributed.initialize(
            self.coordinator,
            num_processes=self.count,
            process_id=self.index,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def has_lost_peers(error: BaseException) -> bool:
    """Whether an error says that an exchange with another process failed."""
    return isinstance(error, RuntimeError | ValueError) and _LOST.search(str(error)) is not None


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """The JSON value that `make` gives in the first process, in all of them; alone, what it gives.

    An error of `make` ends the first process, and thereby the others.
    """
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(size, b" ")[:size], np.uint8))
    return json.loads(np.asarray(sent, np.uint8).tobytes())


def array_from_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, in all of them; the others give one of its shape and dtype."""
    return array if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them call this."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))

"""The launcher of one of several processes: runs it, and says how it ended when it cannot say so itself.

JAX's coordination client ends a process by SIGABRT, from a thread of its own, when the coordinator or a peer is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

from .processes import Processes

_CHILD = "BIPOLAR_JAX_LAUNCHED"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
REMEDY = "start all processes again with the same commands; training resumes from its last checkpoint"


def is_launched() -> bool:
    """Whether this process runs below a launcher. It then ends with it, even if the launcher is killed."""
    if os.environ.get(_CHILD) != "1":
        return False
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return True


def launch(processes: Processes) -> int:
    """Runs this process's own command again below it, and waits; returns the status to exit with."""
    child = subprocess.Popen(sys.orig_argv, env=os.environ | {_CHILD: "1"})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the program handles it
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    status = child.wait()
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    cause = f"JAX lost the coordinator {processes.coordinator} or a peer" if name == "SIGABRT" else "it was stopped"
    print(f"error: {processes} ended by {name}: {cause}; {REMEDY}", file=sys.stderr, flush=True)
    return 1


def leave(message: str, status: int) -> None:
    """Ends one of several processes at once: JAX's own exit would wait for peers that may be gone."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
